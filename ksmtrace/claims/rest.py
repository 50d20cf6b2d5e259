"""Samples of the kernel's counters that are true of one moment, because KSM rested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ksmtrace.analysis.recorded import has_flag
from ksmtrace.claims.claim import Case, Evidence, Finding, holds, unknown, violated
from ksmtrace.events import EventFlag, of_kind
from ksmtrace.stream import CounterSample, Scalar

Values = Mapping[str, Scalar]

FOUR = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
"""The counters that divide all rmap_items among them."""


@dataclass(frozen=True)
class AtRest:
    """Counters that were read while KSM rested.

    Attributes:
        at_ns: CLOCK_MONOTONIC of the reading.
        where: what reading it was, for the evidence.
        counters: files of /sys/kernel/mm/ksm by name; None for one that is absent.
        processes: lines of ksm_stat of the processes that were read with them.
        everybody: whether these are all processes that KSM knows.
        leaked_pages: what ksm_zero_pages was before anybody used KSM: pages that forks left out
            (DOC11.fork), which stay counted.
    """

    at_ns: int
    where: str
    counters: Values
    processes: tuple[Values, ...]
    everybody: bool
    leaked_pages: int = 0

    def numbers(self, *names: str) -> list[int] | None:
        """Return the counters' values; None where one of them is absent."""
        values = [self.counters.get(name) for name in names]
        return (
            [int(value) for value in values if isinstance(value, int)]
            if all(isinstance(value, int) for value in values)
            else None
        )


def counters_at_rest(case: Case) -> list[AtRest]:
    """Find the samples and readings for which run was 0 or 2 and nothing happened meanwhile.

    A reading of 0 means that the batch before is over (mm/ksm.c:run_store sets ksm_run under
    ksm_thread_mutex); nothing but memory hot-plug and unmerging then moves the counters. A reading
    of 2 counts where the write that has unmerged was seen to be through. Samples before which
    events may be missing are left out.
    """
    found = [
        AtRest(
            sample.begin_ns,
            "counter sample",
            sample.ksm,
            tuple(sample.processes.values()),
            False,
        )
        for sample in case.recorded.settled_samples()
        if sample.ksm.get("run") in (0, 2) and not _disturbed(case, sample)
    ]
    for trial in case.trials.values():
        before = [reading.counters.get("ksm_zero_pages") for reading in trial.readings[:1]]
        for reading in trial.readings:
            if reading.counters.get("run") in (0, 2) and not trial.others:
                found.append(
                    AtRest(
                        reading.begin_ns,
                        f"workload {trial.name}, {reading.label}",
                        reading.counters,
                        tuple(reading.processes.values()),
                        bool(reading.notes.get("everybody")),
                        before[0] if isinstance(before[0], int) else 0,
                    )
                )
    return sorted(found, key=lambda rest: rest.at_ns)


def arithmetic(wrong: Sequence[tuple[int, str, str]], count: int, observed: str) -> Finding:
    """Judge readings at rest by those that contradict.

    Args:
        wrong: of each its moment, which reading it was, and what contradicts.
        count: how many readings were judged.
        observed: what was found in all, where none contradicts.
    """
    if wrong:
        return violated(
            f"{len(wrong)} of {count} readings contradict",
            *(Evidence("counters", f"{where}: {says}", at_ns) for at_ns, where, says in wrong[:5]),
        )
    if not count:
        return unknown("the counters were never read while KSM rested (run 0 or 2)")
    return holds(f"{observed}, at {count} readings at rest")


def _disturbed(case: Case, sample: CounterSample) -> bool:
    events = case.recorded.events
    breaks = of_kind(events, "break_ksm")
    acts = np.r_[events["ts_ns"][has_flag(events, EventFlag.IN_KSMD)], breaks["ts_ns"]]
    if ((acts >= sample.begin_ns) & (acts <= sample.end_ns)).any():
        return True
    stores = of_kind(events, "run_store")
    entered = stores["ts_ns"] - stores["duration_ns"]
    if ((entered <= sample.end_ns) & (stores["ts_ns"] >= sample.begin_ns)).any():
        return True
    # While run=2 unmerges, run reads 2 already: its writer must be known to be through.
    before = stores[stores["ts_ns"] < sample.begin_ns]
    known = len(before) > 0 and bool(before["run"][-1] == 2)
    return sample.ksm.get("run") == 2 and not known
