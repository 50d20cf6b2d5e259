"""Moments as bytes, on their way from the process that makes them to the one that draws them.

A message is JSON with arrays behind it. What never changes (:data:`_LASTING`, every array and long
mapping) is sent once: as long as the moments that follow hold it too, they only name its number.
"""

from __future__ import annotations

import functools
import json
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from ksmtrace import errors
from ksmtrace.analysis.books import Entry
from ksmtrace.analysis.contention import Contention, Party, Wait
from ksmtrace.analysis.live import PassFigures, Picture, SamplePoint, Trees
from ksmtrace.analysis.process_tally import LiveProcess
from ksmtrace.analysis.rates import Rates
from ksmtrace.analysis.tallies import MergeFigures, Pass
from ksmtrace.analysis.topics import CauseFigures, PageFigures
from ksmtrace.analysis.visits import Histogram
from ksmtrace.claims.claim import Claim, Evidence, Finding, Verdict
from ksmtrace.claims.judgement import Judgement
from ksmtrace.errors import KsmtraceError
from ksmtrace.kernel.ksm_memory import KsmMemory, ScanCursor
from ksmtrace.kernel.page_truth import PageTruth
from ksmtrace.kernel.probes import KpfProbe
from ksmtrace.reconstruct.state import Incomplete, Older, Scan, Totals, TreeState, World
from ksmtrace.stream import (
    Batch,
    CounterSample,
    Header,
    Losses,
    ProcessSeen,
    StackSeen,
    Trailer,
    Witnessed,
)

from .moment import Judged, PageSavings, Phase, Position, Recorder, Shown

Buffer = bytes | bytearray | memoryview

_LASTING = (
    *(Header, Batch, CounterSample, Losses, ProcessSeen, StackSeen, Witnessed, Trailer),
    *(TreeState, Trees, LiveProcess, Judged, Entry, SamplePoint, Contention),
)
_CLASSES = {
    one.__name__: one
    for one in (
        *_LASTING,
        *(Shown, Position, Recorder, PageSavings, Judgement, Finding, Evidence),
        *(CauseFigures, PageFigures, Histogram, Party, Wait),
        *(Picture, Rates, PassFigures, Pass, MergeFigures),
        *(Incomplete, Older, Scan, Totals, KsmMemory, ScanCursor, PageTruth, KpfProbe),
    )
}
_ENUMS = {one.__name__: one for one in (Phase, Verdict, World)}
_LONG = 32  # entries of a mapping that is sent once too
_PLAIN = frozenset((int, float, str, bool, type(None)))
_LENGTHS = struct.Struct("<QQ")  # of the JSON; how many arrays, whose lengths follow
_LENGTH = struct.Struct("<Q")


@functools.cache
def _names(of: str) -> tuple[str, ...]:
    return tuple(field.name for field in fields(_CLASSES[of]))


def _described(dtype: np.dtype[Any]) -> Any:
    # Fields may overlap, as an event's do.
    if dtype.fields is None:
        return dtype.str
    formats, offsets = zip(*((of.str, at) for of, at, *_ in dtype.fields.values()), strict=True)
    return {
        "names": list(dtype.fields),
        "formats": formats,
        "offsets": offsets,
        "itemsize": dtype.itemsize,
    }


class Packer:
    """Writes messages; each is to be read by one :class:`Unpacker`, in order."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Any]] = {}
        self._named: dict[int, tuple[int, Any]] = {}
        self._next = 0
        self._buffers: list[Buffer] = []

    def pack(self, value: object) -> tuple[bytes, list[Buffer]]:
        """Return a value as JSON, and the arrays that belong to it.

        Raises:
            TypeError: a value of a kind that no message may hold.
        """
        self._named, self._buffers = {}, []
        packed = self._pack(value)
        self._known = self._named
        return json.dumps(packed, separators=(",", ":")).encode(), self._buffers

    def _pack(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is np.ndarray or kind in _LASTING:
            return self._lasting(value)
        if kind.__name__ in _CLASSES and kind is _CLASSES[kind.__name__]:
            return self._object(value)
        if kind in (tuple, list):
            return ["t" if kind is tuple else "l", *map(self._pack, value)]
        if kind is dict and len(value) > _LONG:
            return self._lasting(value)
        if isinstance(value, Mapping):
            return self._mapping(value)
        return self._rare(value)

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        return ["d", *(self._pack(one) for pair in value.items() for one in pair)]

    def _object(self, value: Any) -> Any:
        kind = type(value)
        return ["o", kind.__name__, *(self._pack(getattr(value, n)) for n in _names(kind.__name__))]

    def _lasting(self, value: Any) -> Any:
        told = self._known.get(id(value)) or self._named.get(id(value))
        if told is not None:
            self._named[id(value)] = told
            return ["@", told[0]]
        self._next += 1
        number = self._next
        self._named[id(value)] = number, value
        if not isinstance(value, np.ndarray):
            packed = self._mapping(value) if type(value) is dict else self._object(value)
            return ["=", number, packed]
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        self._buffers.append(flat.data)
        return ["=", number, ["a", _described(value.dtype), list(value.shape)]]

    def _rare(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            return self._pack(value.item())
        if isinstance(value, Enum):
            return ["e", _ENUMS[type(value).__name__].__name__, value.value]
        if isinstance(value, Path):
            return ["p", str(value)]
        if isinstance(value, Claim):
            # Its check is a function; both processes have the same table.
            return ["c", value.id]
        if isinstance(value, KsmtraceError):
            return ["x", type(value).__name__, str(value), value.hint, value.exit_status]
        raise TypeError(f"no message may hold a {type(value).__name__}")


class Unpacker:
    """Reads what a :class:`Packer` has written."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}
        self._named: dict[int, Any] = {}
        self._buffers: list[Buffer] = []
        self._readers: dict[str, Callable[..., Any]] = {
            "t": lambda *parts: tuple(map(self._unpack, parts)),
            "l": lambda *parts: list(map(self._unpack, parts)),
            "d": self._mapping,
            "o": lambda name, *parts: _CLASSES[name](*map(self._unpack, parts)),
            "@": self._reference,
            "=": self._definition,
            "a": self._array,
            "e": lambda name, value: _ENUMS[name](value),
            "p": Path,
            "c": _claim,
            "x": _error,
        }

    def unpack(self, packed: bytes | bytearray, buffers: Sequence[Buffer]) -> Any:
        """Return the value."""
        self._named, self._buffers = {}, list(reversed(buffers))
        value = self._unpack(json.loads(packed))
        self._known = self._named
        return value

    def _unpack(self, packed: Any) -> Any:
        if type(packed) is not list:
            return packed
        return self._readers[packed[0]](*packed[1:])

    def _mapping(self, *parts: Any) -> dict[Any, Any]:
        found = [self._unpack(part) for part in parts]
        return dict(zip(found[::2], found[1::2], strict=True))

    def _reference(self, number: int) -> Any:
        value = self._named[number] if number in self._named else self._known[number]
        self._named[number] = value
        return value

    def _definition(self, number: int, packed: Any) -> Any:
        value = self._named[number] = self._unpack(packed)
        return value

    def _array(self, dtype: Any, shape: list[int]) -> Any:
        return np.frombuffer(self._buffers.pop(), np.dtype(dtype)).reshape(shape)


def _claim(number: str) -> Claim:
    return _claims()[number]


@functools.cache
def _claims() -> dict[str, Claim]:
    from ksmtrace.claims.table import CLAIMS

    return {claim.id: claim for claim in CLAIMS}


def _error(name: str, message: str, hint: str | None, exit_status: int) -> KsmtraceError:
    # One of a kind that errors.py does not know keeps its exit status.
    error: KsmtraceError = getattr(errors, name, KsmtraceError)(message, hint)
    error.exit_status = exit_status
    return error


class Sender:
    """Sends values; they are to be received by one :class:`Receiver`.

    Args:
        to: a connected socket.
    """

    def __init__(self, to: socket.socket) -> None:
        self._to = to
        self._packer = Packer()

    def send(self, value: object) -> None:
        """Send a value.

        Raises:
            OSError: the other end has gone.
        """
        packed, arrays = self._packer.pack(value)
        lengths = [_LENGTHS.pack(len(packed), len(arrays))]
        lengths += [_LENGTH.pack(len(array)) for array in arrays]
        self._to.sendall(b"".join(lengths) + packed)
        for array in arrays:
            self._to.sendall(array)


class Receiver:
    """Receives what a :class:`Sender` sends.

    Args:
        come_from: a connected socket.
    """

    def __init__(self, come_from: socket.socket) -> None:
        self._come_from = come_from
        self._unpacker = Unpacker()

    def receive(self) -> Any:
        """Wait for a value; None when the other end has gone."""
        head = self._read(_LENGTHS.size)
        if head is None:
            return None
        length, nr_arrays = _LENGTHS.unpack(head)
        lengths = self._read(_LENGTH.size * nr_arrays)
        packed = self._read(length)
        arrays = [self._read(one) for (one,) in _LENGTH.iter_unpack(lengths or b"")]
        if packed is None or lengths is None or None in arrays:
            return None
        return self._unpacker.unpack(packed, [array for array in arrays if array is not None])

    def _read(self, length: int) -> bytearray | None:
        content = bytearray(length)
        left = memoryview(content)
        while left:
            try:
                count = self._come_from.recv_into(left)
            except OSError:
                return None
            if not count:
                return None
            left = left[count:]
        return content
