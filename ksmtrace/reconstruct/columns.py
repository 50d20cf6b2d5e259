"""Tables whose rows are found by a kernel address, and the order that groups events by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
"""Row numbers of a table, shape (n,)."""


def stable_order(keys: npt.NDArray[np.uint64]) -> Rows:
    """Return the order that sorts keys and leaves equal ones as they are, shape (n,).

    Kernel addresses of one sort lie within a few GiB: sorting their 16-bit digits, lowest first,
    takes two or three passes, and a quarter of numpy's time for 64-bit keys.
    """
    if len(keys) == 0:
        return np.empty(0, np.int64)
    digits = keys - keys.min()
    if not (digits & np.uint64(7)).any():
        digits >>= np.uint64(3)
    order: Rows = np.argsort(digits.astype(np.uint16), kind="stable")
    while (digits := digits >> np.uint64(16)).any():
        order = order[np.argsort(digits[order].astype(np.uint16), kind="stable")]
    return order


class Groups:
    """Events in groups of equal keys, each group in the events' order.

    Attributes:
        order: the places of the events, group by group, shape (n,).
        first: per event in that order whether it is its group's first, shape (n,).
        number: per event in that order the number of its group, from 0, shape (n,).
        keys: the keys of the groups, rising, shape (m,).
    """

    def __init__(self, keys: npt.NDArray[np.uint64]) -> None:
        self.order = stable_order(keys)
        ordered = keys[self.order]
        self.first = np.ones(len(keys), bool)
        self.first[1:] = ordered[1:] != ordered[:-1]
        self.number: Rows = np.cumsum(self.first) - 1
        self.keys = ordered[self.first]
        self._starts = np.flatnonzero(self.first)

    def last(self) -> Rows:
        """Return where in the order each group's last event is, shape (m,)."""
        return np.r_[self._starts[1:], len(self.order)] - 1 if len(self._starts) else self._starts

    def count_since_first(self, marked: npt.NDArray[np.bool_]) -> Rows:
        """Count per event the marked ones of its group up to and with it, shape (n,)."""
        counts: Rows = np.cumsum(marked)
        before = counts[self._starts] - marked[self._starts]
        return counts - before[self.number]


class Table:
    """Columns of equal length, a row per key.

    Args:
        columns: per name its dtype and the value of a row that nothing is known of.
    """

    def __init__(self, columns: Mapping[str, tuple[str, Any]]) -> None:
        self._columns = columns
        self._held = {name: np.empty(0, dtype) for name, (dtype, _) in columns.items()}
        self._keys = np.empty(0, np.uint64)
        self._rows = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, name: str) -> Array:
        """Return a column, shape (len,): writing to it writes to the table."""
        return self._held[name][: len(self)]

    @property
    def keys(self) -> npt.NDArray[np.uint64]:
        """Return the keys in the order of the rows, shape (len,)."""
        keys = np.empty(len(self), np.uint64)
        keys[self._rows] = self._keys
        return keys

    def find(self, keys: npt.NDArray[np.uint64]) -> Rows:
        """Return the row of each key, -1 for one that is not there; shape (n,)."""
        if not len(self):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        found: Rows = np.where(self._keys[at] == keys, self._rows[at], -1)
        return found

    def find_or_add(self, keys: npt.NDArray[np.uint64]) -> Rows:
        """Return the row of each key, new rows for new keys.

        Args:
            keys: rising and without repetition, shape (n,).
        """
        rows = self.find(keys)
        new = rows < 0
        count = int(np.count_nonzero(new))
        if not count:
            return rows
        old = len(self)
        rows[new] = np.arange(old, old + count)
        for name, (dtype, unknown) in self._columns.items():
            held = self._held[name]
            if len(held) < old + count:
                grown = np.empty(max(old + count, 2 * len(held)), dtype)
                grown[:old] = held[:old]
                self._held[name] = held = grown
            held[old : old + count] = unknown
        places = np.searchsorted(self._keys, keys[new])
        self._keys = np.insert(self._keys, places, keys[new])
        self._rows = np.insert(self._rows, places, rows[new])
        return rows

    def forget(self, rows: Rows) -> None:
        """Set rows back to what nothing is known of, but for the column ``generation``."""
        for name, (_, unknown) in self._columns.items():
            if name != "generation":
                self._held[name][rows] = unknown

    def copy(self) -> Table:
        """Return a table of its own with the same content."""
        copied = Table(self._columns)
        copied._held = {name: self[name].copy() for name in self._columns}
        copied._keys, copied._rows = self._keys, self._rows  # never written to in place
        return copied
