"""A :class:`~ksmtrace.stream.Witnessed` in a recording: a note, and notes with its arrays.

An array is cut into runs of rows, so that no message of the recording grows long.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ksmtrace.kernel import ksm_memory, page_truth
from ksmtrace.kernel.ksm_memory import KsmMemory, ScanCursor
from ksmtrace.kernel.page_truth import PageTruth
from ksmtrace.kernel.probes import KpfProbe
from ksmtrace.stream import Witnessed

ROWS_NOTE = "WitnessRows"

_DTYPES: Mapping[str, Mapping[str, np.dtype[Any]]] = {
    "memory": {
        "stable_nodes": ksm_memory.STABLE_NODE_DTYPE,
        "sharers": ksm_memory.SHARER_DTYPE,
        "rmap_items": ksm_memory.RMAP_ITEM_DTYPE,
        "unstable_nodes": ksm_memory.UNSTABLE_NODE_DTYPE,
        "mm_slots": ksm_memory.MM_SLOT_DTYPE,
    },
    "pages": {"ranges": page_truth.RANGE_DTYPE, "pages": page_truth.PAGE_DTYPE},
}
_ROWS = 1 << 15
_PLAIN_KINDS = "iubS"  # of a field's dtype: numbers, booleans and bytes; nothing that is code

Array = npt.NDArray[Any]


def iter_notes(witnessed: Witnessed) -> Iterator[dict[str, Any]]:
    """Yield the notes, as plain JSON types: first the one that says how many rows follow."""
    head: dict[str, Any] = {
        "type": Witnessed.__name__,
        "moment": witnessed.moment,
        "begin_ns": witnessed.begin_ns,
        "end_ns": witnessed.end_ns,
        "why_not": dict(witnessed.why_not),
        "rows": {},
    }
    arrays: dict[str, Array] = {}
    for part, dtypes in _DTYPES.items():
        truth = getattr(witnessed, part)
        if truth is None:
            continue
        head[part] = {
            field.name: _plain(getattr(truth, field.name))
            for field in dataclasses.fields(truth)
            if field.name not in dtypes
        }
        for name in dtypes:
            arrays[f"{part}.{name}"] = getattr(truth, name)
    head["rows"] = {name: len(array) for name, array in arrays.items()}
    yield head
    for name, array in arrays.items():
        for begin in range(0, len(array), _ROWS):
            rows = np.ascontiguousarray(array[begin : begin + _ROWS])
            yield {
                "type": ROWS_NOTE,
                "array": name,
                "dtype": [[field, rows.dtype[field].str] for field in rows.dtype.names or ()],
                "rows": base64.b64encode(rows.tobytes()).decode(),
            }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if isinstance(value, Mapping) else value


class Gathering:
    """One reading of the witnesses as its notes come in."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = head
        self._left: dict[str, int] = {name: int(n) for name, n in head["rows"].items()}
        self._parts: dict[str, list[Array]] = {name: [] for name in self._left}

    def add(self, note: Mapping[str, Any]) -> None:
        """Take one run of rows.

        Raises:
            ValueError: rows of no such array, more than announced, or of no plain type.
        """
        name = note["array"]
        dtype = np.dtype([(field, form) for field, form in note["dtype"]])
        if any(dtype[field].kind not in _PLAIN_KINDS for field in dtype.names or ()):
            raise ValueError(f"rows of {name} are of type {dtype}")
        rows = np.frombuffer(base64.b64decode(note["rows"], validate=True), dtype)
        if not 0 < len(rows) <= self._left.get(name, 0):
            raise ValueError(f"{len(rows)} rows of {name}, and {self._left.get(name, 0)} are left")
        self._left[name] -= len(rows)
        self._parts[name].append(rows)

    def whole(self) -> Witnessed | None:
        """Return the reading, None while rows are still to come."""
        if any(self._left.values()):
            return None
        head = self._head
        return Witnessed(
            moment=head["moment"],
            begin_ns=head["begin_ns"],
            end_ns=head["end_ns"],
            memory=self._memory(),
            pages=self._pages(),
            why_not=head["why_not"],
        )

    def _memory(self) -> KsmMemory | None:
        fields = self._head.get("memory")
        if fields is None:
            return None
        return KsmMemory(
            **{
                **fields,
                "cursor": ScanCursor(**fields["cursor"]),
                "changed": tuple(fields["changed"]),
                "torn": tuple(fields["torn"]),
            },
            **self._arrays("memory"),
        )

    def _pages(self) -> PageTruth | None:
        fields = self._head.get("pages")
        if fields is None:
            return None
        kpf_ksm = KpfProbe(**fields["kpf_ksm"])
        return PageTruth(**{**fields, "kpf_ksm": kpf_ksm}, **self._arrays("pages"))

    def _arrays(self, part: str) -> dict[str, Any]:
        return {
            name: _as_dtype(self._parts[f"{part}.{name}"], dtype)
            for name, dtype in _DTYPES[part].items()
        }


def _as_dtype(parts: list[Array], dtype: np.dtype[Any]) -> Array:
    # By name: another ksmtrace may have written more fields, or fewer.
    found = np.zeros(sum(map(len, parts)), dtype)
    at = 0
    for rows in parts:
        for field in set(dtype.names or ()) & set(rows.dtype.names or ()):
            found[field][at : at + len(rows)] = rows[field]
        at += len(rows)
    return found
