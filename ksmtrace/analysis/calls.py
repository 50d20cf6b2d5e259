"""The functions that programs were on: how often they ran, what they returned, how long it took."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ksmtrace.analysis.recorded import Recorded
from ksmtrace.events import KIND_BY_NAME, Events, of_kind

# Calls may be under way as the programs are attached, and as they are detached.
_FEW_CALLS = 3


@dataclass(frozen=True)
class Durations:
    """How long the calls of a function took, from entry to exit, in nanoseconds."""

    median_ns: int
    p99_ns: int
    max_ns: int


@dataclass(frozen=True)
class Calls:
    """One function with programs.

    Attributes:
        entered: how often it was entered, None where there is no program on its entry. For an
            inlined function, how often its place was passed.
        returned: the same of its exit.
        results: per errno name, ``0`` for none, how many calls ended with it; None for a function
            whose exit makes no event.
        duration: None where unknown, and where it was not called.
    """

    entered: int | None
    returned: int | None
    results: Mapping[str, int] | None = None
    duration: Durations | None = None

    @property
    def missed(self) -> int:
        """Entries without an exit, or exits without an entry, beyond what may be under way."""
        if self.entered is None or self.returned is None:
            return 0
        missed = abs(self.entered - self.returned)
        return missed if missed > _FEW_CALLS else 0


def find_calls(recorded: Recorded) -> dict[str, Calls] | None:
    """Return the calls per function, by its name in bpf/functions.c; None without any program."""
    if not recorded.losses or not recorded.losses[-1].calls:
        return None
    found = {}
    for name, (entered, returned) in recorded.losses[-1].calls.items():
        kind = KIND_BY_NAME.get(name)
        timed = kind is not None and "duration_ns" in kind.body and recorded.can_see(name)
        events = of_kind(recorded.events, name) if timed else None
        found[name] = Calls(
            entered,
            returned,
            results=None if events is None else count_results(events),
            duration=None if events is None else _durations(events),
        )
    return found


def count_results(events: Events) -> dict[str, int]:
    """Count events by result: errno names, and ``0`` for success."""
    numbers, counts = np.unique(-events["err"], return_counts=True)  # success first
    return {
        "0" if number == 0 else errno.errorcode.get(int(number), str(-number)): int(count)
        for number, count in zip(numbers, counts, strict=True)
    }


def _durations(events: Events) -> Durations | None:
    known = events["duration_ns"][events["duration_ns"] != 0]
    if not len(known):
        return None
    # A call that lasted so long, and no value between two of them.
    median, p99 = np.quantile(known, [0.5, 0.99], method="inverted_cdf")
    return Durations(int(median), int(p99), int(known.max()))
