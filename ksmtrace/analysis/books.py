"""The kernel's counters beside what the events say they should be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ksmtrace.analysis.merges import find_merges, find_zero_merges
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.events import Events, of_kind
from ksmtrace.stream import CounterSample, Scalar

# ksmd counts a merge some time after its event: an append waits for the page lock between.
_SKEW_NS = 1_000_000
_ONE_BY_ONE = (
    "ksm_start_scan",
    "ksm_stop_scan",
    "ksm_merge_one_page",
    "ksm_merge_with_ksm_page",
    "ksm_remove_ksm_page",
    "ksm_remove_rmap_item",
)

EXACT = "exact"
EXPLAINED = "explained"
CONTRADICTION = "contradiction"
UNKNOWN = "unknown"
SAMPLED = "sampled"


@dataclass(frozen=True)
class Entry:
    """One counter over the recording.

    Attributes:
        counter: its name in /sys/kernel/mm/ksm, or what it was computed from.
        first: its value in the first sample, None where the kernel does not have it.
        last: its value in the last sample.
        delta: last minus first, None for text and absent values.
        events_say: what delta should be by the events, None where no event tells of it.
        difference: delta minus events_say.
        verdict: ``exact``; ``explained`` (the difference is of a kind that no tracepoint shows);
            ``contradiction`` (mm/ksm.c allows no such difference); ``unknown`` (losses, or the
            counter moved while it was sampled); ``sampled`` (no event tells of it).
        why: the rule, and what the difference stands for.
    """

    counter: str
    first: Scalar
    last: Scalar
    delta: int | None
    events_say: int | None
    difference: int | None
    verdict: str
    why: str


def balance(recorded: Recorded) -> list[Entry]:
    """Compare every counter of /sys/kernel/mm/ksm and vmstat with the events.

    Only events between the first and the last sample count. Returns an empty list where there
    are no two samples.
    """
    if len(recorded.samples) < 2:
        return []
    first, last = recorded.samples[0], recorded.samples[-1]
    entries = [_judge(recorded, first, last, *rule) for rule in _say(recorded, first, last)]
    judged = {entry.counter for entry in entries}
    for name in first.ksm:
        if name not in judged:
            entries.append(_sampled(name, first.ksm[name], last.ksm.get(name)))
    for name in first.vmstat:
        entries.append(_sampled(name, first.vmstat[name], last.vmstat.get(name)))
    return entries


_Rule = tuple[str, int, int, str, str | None, str | None]


def _say(recorded: Recorded, first: CounterSample, last: CounterSample) -> Iterable[_Rule]:
    """Yield per counter what the events say: (name, delta, unsure, rule, if less, if more).

    ``unsure`` counts the events so near to a sample that it may or may not hold them; ``if
    less`` and ``if more`` explain a counter that is below or above, None where it cannot be.
    """
    merges = find_merges(recorded)
    appended = merges.events[merges.appended]
    pairs = merges.events[merges.pairs]
    freed = of_kind(recorded.events, "ksm_remove_ksm_page")
    removed = of_kind(recorded.events, "ksm_remove_rmap_item")
    zero, zero_ok = find_zero_merges(recorded)

    windows = [unsure_window(recorded, sample) for sample in (first, last)]

    def inside(*groups: Events) -> tuple[list[int], int]:
        counts = [_between(group, first.end_ns, last.begin_ns) for group in groups]
        unsure = sum(_between(group, *window) for group in groups for window in windows)
        return counts, unsure

    if recorded.can_see("ksm_stop_scan"):
        (stops,), unsure = inside(of_kind(recorded.events, "ksm_stop_scan"))
        yield (
            "full_scans",
            stops,
            unsure,
            "one per ksm_stop_scan (mm/ksm.c:scan_get_next_rmap_item)",
            "reset to 0 by run=2" if _value(last, "full_scans") <= stops else None,
            None,
        )
    if recorded.can_see("ksm_merge_with_ksm_page", "ksm_remove_ksm_page"):
        (made, gone), unsure = inside(pairs, freed)
        yield (
            "pages_shared",
            made - gone,
            unsure,
            "new pairs, minus nodes freed",
            "nodes whose last sharer left singly and that are not freed yet",
            "nodes freed now that had lost their last sharer before the recording",
        )
    if recorded.can_see("ksm_merge_with_ksm_page", "ksm_remove_rmap_item"):
        (sharers, made, gone), unsure = inside(appended, pairs, removed)
        yield (
            "pages_sharing",
            sharers - made - gone,
            unsure,
            "pages merged, minus new pairs, minus sharers removed with their node",
            "sharers that left singly (COW, unmap, unmerge, exit): no event, so this many",
            None,
        )
    if recorded.can_see("ksm_merge_one_page"):
        (made,), unsure = inside(zero[zero_ok])
        yield (
            "ksm_zero_pages",
            made,
            unsure,
            "pages replaced by the zero page",
            "zero pages unmapped or written to since: no event, so at least this many",
            "zero pages that forks took over",
        )


def _judge(
    recorded: Recorded,
    first: CounterSample,
    last: CounterSample,
    name: str,
    say: int,
    unsure: int,
    rule: str,
    if_less: str | None,
    if_more: str | None,
) -> Entry:
    entry = _sampled(name, first.ksm.get(name), last.ksm.get(name))
    if entry.delta is None:
        return entry
    difference = entry.delta - say
    explanation = if_less if difference < 0 else if_more
    if sum(recorded.lost().values()):
        verdict, why = UNKNOWN, "events were lost"
    elif difference == 0:
        verdict, why = EXACT, rule
    elif abs(difference) <= unsure:
        verdict, why = UNKNOWN, f"{unsure} events happened while a sample was taken"
    elif explanation is not None:
        verdict, why = EXPLAINED, explanation
    else:
        verdict, why = CONTRADICTION, f"mm/ksm.c allows no such difference: {rule}"
    return Entry(name, entry.first, entry.last, entry.delta, say, difference, verdict, why)


def _sampled(name: str, first: Scalar, last: Scalar) -> Entry:
    delta = last - first if isinstance(first, int) and isinstance(last, int) else None
    return Entry(name, first, last, delta, None, None, SAMPLED, "no event tells of it")


def _value(sample: CounterSample, name: str) -> int:
    value = sample.ksm.get(name)
    return value if isinstance(value, int) else 0


def unsure_window(recorded: Recorded, sample: CounterSample) -> tuple[int, int]:
    """Return the times between which the sample may or may not hold an event.

    ksmd deals with one page after the other, so of all that it did longer ago only the very last
    can be uncounted, when ksmd lost its CPU right after the event.
    """
    begin_ns = sample.begin_ns - _SKEW_NS
    one_by_one = of_kind(recorded.events, *_ONE_BY_ONE)
    before = one_by_one["ts_ns"][one_by_one["ts_ns"] < sample.begin_ns]
    if len(before):
        begin_ns = min(begin_ns, int(before.max()))
    return begin_ns, sample.end_ns + _SKEW_NS


def _between(events: Events, begin_ns: int, end_ns: int) -> int:
    times = events["ts_ns"]
    return int(np.count_nonzero((times >= begin_ns) & (times <= end_ns)))
