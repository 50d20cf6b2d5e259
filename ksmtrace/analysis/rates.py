"""Counts per span of time, of a stream as it comes: the last ten minutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BUCKET_NS = 250_000_000
KEPT_BUCKETS = 2_400


@dataclass(frozen=True)
class Rates:
    """Counts per span of time.

    Attributes:
        begin_ns: when the first span begins, CLOCK_MONOTONIC.
        span_ns: how long one is.
        counts: by name the counts, int64 of shape (n,), oldest first; None where what is counted
            was not caught.
    """

    begin_ns: int
    span_ns: int
    counts: Mapping[str, npt.NDArray[np.int64] | None]


class RateRing:
    """Counts in buckets of :data:`BUCKET_NS`, the last :data:`KEPT_BUCKETS` of them.

    Args:
        started_ns: when the first one begins, CLOCK_MONOTONIC.
        names: what is counted.
    """

    def __init__(self, started_ns: int, names: Sequence[str]) -> None:
        self._started_ns = started_ns
        self._counts = np.zeros((len(names), KEPT_BUCKETS), np.int64)
        self._head = 0  # the newest bucket's number
        self._row = {name: row for row, name in enumerate(names)}

    def take(self, name: str, ts_ns: npt.NDArray[np.uint64]) -> None:
        """Count what happened at these times, shape (n,)."""
        if not len(ts_ns):
            return
        buckets = (ts_ns.astype(np.int64) - self._started_ns) // BUCKET_NS
        self._advance(int(buckets.max()))
        lowest = max(self._head - KEPT_BUCKETS + 1, 0)
        buckets = buckets[buckets >= lowest] - lowest
        counts = np.bincount(buckets)
        places = (lowest + np.arange(len(counts))) % KEPT_BUCKETS
        self._counts[self._row[name], places] += counts

    def _advance(self, head: int) -> None:
        new = head - self._head
        if new <= 0:
            return
        places = np.arange(self._head + 1, head + 1)[-KEPT_BUCKETS:] % KEPT_BUCKETS
        self._counts[:, places] = 0
        self._head = head

    def shown(self, at_ns: int, can_see: Callable[[str], bool]) -> Rates:
        """Return the counts until a time.

        Args:
            at_ns: CLOCK_MONOTONIC.
            can_see: whether what is counted by that name was caught.
        """
        self._advance((at_ns - self._started_ns) // BUCKET_NS)
        lowest = max(self._head - KEPT_BUCKETS + 1, 0)
        places = np.arange(lowest, self._head + 1) % KEPT_BUCKETS
        return Rates(
            self._started_ns + lowest * BUCKET_NS,
            BUCKET_NS,
            {
                name: self._counts[row, places] if can_see(name) else None
                for name, row in self._row.items()
            },
        )
