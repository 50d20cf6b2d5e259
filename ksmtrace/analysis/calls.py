"""The functions that programs were on: how often they ran, what they returned, how long it took."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ksmtrace.analysis.recorded import Recorded
from ksmtrace.analysis.visits import find_histogram
from ksmtrace.capture.hooks import WAITED_BY
from ksmtrace.events import KIND_BY_NAME, Events, of_kind

# Calls may be under way as the programs are attached, and as they are detached.
_FEW_CALLS = 3


@dataclass(frozen=True)
class Durations:
    """How long the calls of a function took, from entry to exit, in nanoseconds.

    Attributes:
        median_ns, p99_ns, max_ns: of all calls, exactly.
        slots: counts by powers of two, as :class:`ksmtrace.analysis.visits.Histogram` has them.
    """

    median_ns: int
    p99_ns: int
    max_ns: int
    slots: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Calls:
    """One function with programs.

    Attributes:
        entered: how often it was entered, None where there is no program on its entry. For an
            inlined function, how often its place was passed.
        returned: the same of its exit.
        results: per errno name, ``0`` for none, how many calls ended with it; None where not each
            call that returned has its event: none has, only those that waited, or some are lost.
        duration: None where unknown as well, and where it was not called.
    """

    entered: int | None
    returned: int | None
    results: Mapping[str, int] | None = None
    duration: Durations | None = None

    @property
    def left_inside(self) -> int:
        """Entries beyond exits; negative: exits beyond entries."""
        if self.entered is None or self.returned is None:
            return 0
        return self.entered - self.returned

    @property
    def missed(self) -> int:
        """Entries without an exit, or exits without an entry, beyond what may be under way."""
        missed = abs(self.left_inside)
        return missed if missed > _FEW_CALLS else 0


def find_calls(recorded: Recorded) -> dict[str, Calls] | None:
    """Return the calls per function, by its name in bpf/; None without any program.

    They are counted for all processes together.
    """
    recorded = recorded.of_all()
    if not recorded.losses or not recorded.losses[-1].calls:
        return None
    found = {}
    for name, (entered, returned) in recorded.losses[-1].calls.items():
        kind = KIND_BY_NAME.get(name)
        timed = kind is not None and "duration_ns" in kind.body and recorded.can_see(name)
        timed = timed and name not in WAITED_BY.values() and not recorded.lost().get(name)
        events = of_kind(recorded.events, name) if timed else None
        found[name] = Calls(
            entered,
            returned,
            results=None if events is None else count_results(events),
            duration=None if events is None else durations_of(events),
        )
    return found


def count_results(events: Events) -> dict[str, int]:
    """Count events by result: errno names, and ``0`` for success."""
    numbers, counts = np.unique(-events["err"], return_counts=True)  # success first
    return {
        "0" if number == 0 else _error_name(int(number)): int(count)
        for number, count in zip(numbers, counts, strict=True)
    }


_ERESTARTSYS = 512
"""A signal ended it (include/linux/errno.h); user space never sees this number."""


def _error_name(number: int) -> str:
    return errno.errorcode.get(number, {_ERESTARTSYS: "ERESTARTSYS"}.get(number, str(-number)))


def durations_of(events: Events) -> Durations | None:
    """Sum up the events' ``duration_ns``; None where none is known."""
    known = events["duration_ns"][events["duration_ns"] != 0]
    if not len(known):
        return None
    # A call that lasted so long, and no value between two of them.
    median, p99 = np.quantile(known, [0.5, 0.99], method="inverted_cdf")
    # frexp's exponent is the number of bits.
    histogram = find_histogram(np.bincount(np.frexp(known.astype(float))[1]).tolist())
    assert histogram is not None
    return Durations(int(median), int(p99), int(known.max()), histogram.slots)
