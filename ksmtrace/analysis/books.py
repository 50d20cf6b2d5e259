"""The kernel's counters beside what the events say they should be."""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.merges import Merges, find_merges, find_zero_merges
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.analysis.sharers import JOINS_AND_LEAVES
from ksmtrace.capture.hooks import DERIVED
from ksmtrace.events import KIND_BY_NAME, EventFlag, Events, of_kind, select
from ksmtrace.kernel.sysfs import FILES, FileType
from ksmtrace.stream import CounterSample, Scalar

# ksmd counts a merge some time after its event: an append waits for the page lock between.
SKEW_NS = 1_000_000
ONE_BY_ONE = (
    "ksm_start_scan",
    "ksm_stop_scan",
    "ksm_merge_one_page",
    "ksm_merge_with_ksm_page",
    "ksm_remove_ksm_page",
    "ksm_remove_rmap_item",
    *JOINS_AND_LEAVES,
)

_KNOBS = {file.name for file in FILES if file.type is FileType.KNOB}

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


@dataclass(frozen=True)
class Rule:
    """What is said of one counter.

    Attributes:
        counter: its name.
        say: what its change should be.
        unsure: by how much the samples may miss that, because of what happened meanwhile.
        because: what that is; the verdict is then unknown.
        rule: in words.
        if_less, if_more: what explains a counter that is below or above; None where nothing can.
        by_events: whether lost events make it unknown.
    """

    counter: str
    say: int
    unsure: int
    because: str
    rule: str
    if_less: str | None = None
    if_more: str | None = None
    by_events: bool = True


# Several tables of one report need it.
@functools.lru_cache(maxsize=1)
def balance(recorded: Recorded) -> list[Entry]:
    """Compare every counter of /sys/kernel/mm/ksm and vmstat with the events.

    Only what happened between the first and the last sample counts, of those before which no
    event is missing. Returns an empty list where there are no two such samples.
    """
    settled = recorded.settled_samples()
    if len(settled) < 2:
        return []
    recorded = replace(recorded, samples=settled)
    first, last = recorded.samples[0], recorded.samples[-1]
    # The kernel counts for all processes, and what it counts late may be before the span.
    return enter(recorded, _event_rules(recorded.whole(), first, last))


def enter(recorded: Recorded, event_rules: Iterable[Rule]) -> list[Entry]:
    """Judge all counters, from the first sample to the last.

    Args:
        recorded: samples, losses, the marks of passes; other events are not looked at.
        event_rules: what the events say.
    """
    first, last = recorded.samples[0], recorded.samples[-1]
    rules = [*event_rules, *_count_rules(recorded, first, last)]
    entries = [_judge(recorded, first, last, rule) for rule in rules]
    judged = {entry.counter for entry in entries}
    for name in first.ksm:
        if name not in judged:
            entries.append(_sampled(name, first.ksm[name], last.ksm.get(name)))
    for name in first.vmstat:
        if name not in judged:
            entries.append(_sampled(name, first.vmstat[name], last.vmstat.get(name)))
    return entries


@dataclass(frozen=True)
class History:
    """Counters at each sample; every list has one value per sample.

    Attributes:
        ts_ns: when each sample was begun.
        values: per counter of /sys/kernel/mm/ksm and vmstat, those that are numbers; None where
            absent.
        events_say: per counter that events tell of, its value in the first sample and what they
            say happened since. Empty where events were lost.
    """

    ts_ns: list[int]
    values: dict[str, list[int | None]]
    events_say: dict[str, list[int]]


def find_history(recorded: Recorded) -> History:
    """Put the counters of every sample beside what the events say up to it."""
    samples = recorded.samples
    ts_ns = [sample.begin_ns for sample in samples]
    rows = [{**one.ksm, **one.vmstat} for one in samples]
    values = {
        name: [v if isinstance(v := row.get(name), int) else None for row in rows]
        for name in (rows[0] if rows else ())
        if name not in _KNOBS
    }
    values = {name: counts for name, counts in values.items() if any(c is not None for c in counts)}
    say = {}
    if samples and not any(recorded.lost().values()):
        whole = recorded.whole()
        for said in iter_said(whole, find_merges(whole)):
            counter, moves = said.counter, said.moves
            counts = values.get(counter)
            if counts is None or counts[0] is None:
                continue
            order = np.argsort(moves.ts_ns, kind="stable")
            moved = np.r_[0, np.cumsum(moves.by[order])]
            upto = moved[np.searchsorted(moves.ts_ns[order], [samples[0].end_ns, *ts_ns[1:]])]
            say[counter] = (counts[0] + upto - upto[0]).tolist()
    return History(ts_ns, values, say)


@dataclass(frozen=True)
class Moves:
    """What the events say of one counter: by how much it moved when; all of shape (n,).

    Attributes:
        ts_ns: when each event was told.
        by: by how much the counter moves.
        since_ns: from when on it may have.
    """

    ts_ns: npt.NDArray[np.uint64]
    by: npt.NDArray[np.int64]
    since_ns: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Said:
    """What the events tell of one counter.

    Attributes:
        counter: its name.
        moves: by how much it moved when.
        why: the rule in words.
        if_less, if_more: what explains a counter that is below or above; None where nothing can.
    """

    counter: str
    moves: Moves
    why: str
    if_less: str | None = None
    if_more: str | None = None


def _moves(*signed: tuple[Events, int | npt.NDArray[np.int64]]) -> Moves:
    """Join groups of events, each with the move that every one of its events stands for."""
    ts_ns = np.concatenate([events["ts_ns"] for events, _ in signed])
    by = np.concatenate([np.broadcast_to(np.int64(by), len(events)) for events, by in signed])
    return Moves(ts_ns, by, ts_ns)


def _calls(events: Events) -> Moves:
    """Return what calls stand for that count one each, some time before they are over."""
    moves = _moves((events, 1))
    return replace(moves, since_ns=moves.ts_ns - events["duration_ns"])


def _event_rules(recorded: Recorded, first: CounterSample, last: CounterSample) -> Iterator[Rule]:
    """Yield what the events say."""
    windows = [unsure_window(recorded, sample) for sample in (first, last)]
    for said in iter_said(recorded, find_merges(recorded)):
        moves = said.moves
        near = [
            moves.by[(moves.since_ns <= end_ns) & (moves.ts_ns >= begin_ns)]
            for begin_ns, end_ns in windows
        ]
        yield make_rule(
            said,
            last,
            say=int(moves.by[_within(moves.ts_ns, first.end_ns, last.begin_ns)].sum()),
            unsure=sum(int(np.abs(by).sum()) for by in near),
        )


def make_rule(said: Said, last: CounterSample, say: int, unsure: int) -> Rule:
    """Return what the events say of a counter between two samples.

    Args:
        said: of what the events tell.
        last: the second sample.
        say: by how much the counter should have moved.
        unsure: by how much it moved while the samples were taken.
    """
    if_less = said.if_less
    if said.counter == "full_scans" and _value(last, "full_scans") <= say:
        if_less = "reset to 0 by run=2"
    return Rule(
        said.counter,
        say,
        unsure,
        because="events that happened while a sample was taken: {}",
        rule=said.why,
        if_less=if_less,
        if_more=said.if_more,
    )


def iter_said(recorded: Recorded, merges: Merges) -> Iterator[Said]:
    """Yield what the events say of each counter that they tell of.

    Args:
        recorded: the events, and what their kernel lets be seen.
        merges: the outcomes of the attempts among them.
    """
    if recorded.can_see("ksm_stop_scan"):
        passes = _moves((of_kind(recorded.events, "ksm_stop_scan"), 1))
        yield Said("full_scans", passes, "one per ksm_stop_scan (mm/ksm.c:scan_get_next_rmap_item)")
    if recorded.can_see(*JOINS_AND_LEAVES):
        shared, sharing = joins_and_leaves(recorded)
        why = "every join and leave of a sharer has an event"
        yield Said("pages_shared", shared, why)
        yield Said("pages_sharing", sharing, why)
    else:
        yield from _by_tracepoints(recorded, merges)
    if recorded.can_see("ksm_merge_one_page"):
        zero, zero_ok = find_zero_merges(recorded)
        yield Said(
            "ksm_zero_pages",
            _moves((zero[zero_ok], 1)),
            "pages replaced by the zero page",
            "zero pages unmapped or written to since: no event, so at least this many",
            "zero pages that forks took over",
        )
    if recorded.can_see("do_wp_page"):
        faults = of_kind(recorded.events, "do_wp_page")
        yield Said(
            "cow_ksm",
            # A fault that userfaultfd takes is over before it is counted.
            _calls(faults[faults["err"] != -errno.EAGAIN]),
            "one per fault on a KSM page that copies it or fails to (mm/memory.c:do_wp_page)",
            None,
            None,
        )
    if recorded.can_see("ksm_might_need_to_copy"):
        swapped = of_kind(recorded.events, "ksm_might_need_to_copy")
        yield Said(
            "ksm_swpin_copy",
            _moves((swapped[swapped["err"] == 0], 1)),
            "one per copy (mm/ksm.c:ksm_might_need_to_copy)",
            None,
            None,
        )
    if recorded.can_see("split_huge_page_to_list"):
        splits = of_kind(recorded.events, "split_huge_page_to_list")
        yield Said(
            "thp_split_page",
            _calls(splits[splits["err"] == 0]),
            "huge pages that ksmd split",
            None,
            "huge pages that others split",
        )


def joins_and_leaves(recorded: Recorded) -> tuple[Moves, Moves]:
    """Return the moves of pages_shared and pages_sharing, by the functions that make them.

    mm/ksm.c:stable_tree_append counts a node's first sharer in pages_shared and every other one
    in pages_sharing; remove_rmap_item_from_tree and remove_node_from_stable_tree take them off
    again. What is removed from a node that turned out stale is among the node's own sharers.
    """
    appended = of_kind(recorded.events, "stable_tree_append")
    first = has_flag(appended, EventFlag.FIRST_SHARER)
    removed = of_kind(recorded.events, "remove_rmap_item_from_tree")
    removed = select(removed, ~has_flag(removed, EventFlag.NODE_FREED))
    last = has_flag(removed, EventFlag.LAST_SHARER)
    freed = of_kind(recorded.events, "remove_node_from_stable_tree")
    # A chain has STABLE_NODE_CHAIN (-1024) there; chains are freed elsewhere.
    sharers = np.maximum(freed["sharers"].astype(np.int64), 0)
    shared = _moves(
        (select(appended, first), 1), (select(removed, last), -1), (freed, -np.minimum(sharers, 1))
    )
    sharing = _moves(
        (select(appended, ~first), 1),
        (select(removed, ~last), -1),
        (freed, -np.maximum(sharers - 1, 0)),
    )
    return shared, sharing


def _by_tracepoints(recorded: Recorded, merges: Merges) -> Iterator[Said]:
    """Yield what the tracepoints say, which leave out what happens to sharers one by one."""
    pairs = select(merges.events, merges.pairs)
    if recorded.can_see("ksm_merge_with_ksm_page", "ksm_remove_ksm_page"):
        yield Said(
            "pages_shared",
            _moves((pairs, 1), (of_kind(recorded.events, "ksm_remove_ksm_page"), -1)),
            "new pairs, minus nodes freed",
            "nodes whose last sharer left singly and that are not freed yet",
            "nodes freed now that had lost their last sharer before the recording",
        )
    if recorded.can_see("ksm_merge_with_ksm_page", "ksm_remove_rmap_item"):
        removed = of_kind(recorded.events, "ksm_remove_rmap_item")
        yield Said(
            "pages_sharing",
            _moves((select(merges.events, merges.appended), 1), (pairs, -1), (removed, -1)),
            "pages merged, minus new pairs, minus sharers removed with their node",
            "sharers that left singly (COW, unmap, unmerge, exit): no event, so this many",
        )


_COUNTED: Mapping[str, tuple[str, str, str]] = {
    "pages_scanned": (
        "cmp_and_merge_page",
        "one per cmp_and_merge_page (mm/ksm.c:ksm_do_scan)",
        "pages that ksmd found and had no memory for an rmap_item of",
    ),
    "pages_skipped": (
        "smart_scan_skips",
        "one per page that should_skip_rmap_item let pass",
        "",
    ),
}


def _count_rules(recorded: Recorded, first: CounterSample, last: CounterSample) -> Iterator[Rule]:
    """Yield what the kernel-side counts say, which were read a moment after each sample."""
    whole = recorded.whole()
    after_first, after_last = whole.tallies_after(first), whole.tallies_after(last)
    if after_first is None or after_last is None:
        return
    before_last = whole.tallies_after(recorded.samples[-2]) or after_first
    at_first = _may_scan(whole, first.begin_ns, after_first.ts_ns)
    at_last = _may_scan(whole, last.begin_ns, after_last.ts_ns)
    derived = whole.rung("cmp_and_merge_page") == DERIVED
    for counter, (name, why, if_less) in _COUNTED.items():
        if name not in after_last.counted:
            continue
        # What ksmd did between a sample and the reading of the counts after it is at most what
        # it did until the next sample, or since the last reading. One page more, as a look is
        # counted when it begins, and in the file when it is over.
        until_next = _value(recorded.samples[1], counter) - _value(first, counter) + 1
        since_last = after_last.counted[name] - before_last.counted.get(name, 0) + 1
        yield Rule(
            counter,
            say=after_last.counted[name] - after_first.counted.get(name, 0),
            unsure=max(until_next * at_first, since_last * at_last),
            because="pages that ksmd may have looked at between a sample and its count: {}",
            rule=why,
            if_less=if_less if derived and if_less else None,
            by_events=False,
        )


def _may_scan(recorded: Recorded, begin_ns: int, end_ns: int) -> bool:
    """Say whether ksmd may have looked at pages in that time: only a pass does."""
    if not recorded.can_see("ksm_start_scan", "ksm_stop_scan"):
        return True
    marks = of_kind(recorded.events, "ksm_start_scan", "ksm_stop_scan")
    if _within(marks["ts_ns"], begin_ns - SKEW_NS, end_ns).any():
        return True
    before = marks[marks["ts_ns"] < begin_ns]
    stop = KIND_BY_NAME["ksm_stop_scan"].number
    return not len(before) or bool(before["kind"][-1] != stop)


def _judge(recorded: Recorded, first: CounterSample, last: CounterSample, rule: Rule) -> Entry:
    before, after = ({**sample.vmstat, **sample.ksm} for sample in (first, last))
    entry = _sampled(rule.counter, before.get(rule.counter), after.get(rule.counter))
    if entry.delta is None:
        return entry
    difference = entry.delta - rule.say
    explanation = rule.if_less if difference < 0 else rule.if_more
    if rule.by_events and any(recorded.lost().values()):
        verdict, why = UNKNOWN, "events were lost"
    elif difference == 0:
        verdict, why = EXACT, rule.rule
    elif abs(difference) <= rule.unsure:
        verdict, why = UNKNOWN, rule.because.format(rule.unsure)
    elif explanation is not None:
        verdict, why = EXPLAINED, explanation
    else:
        verdict, why = CONTRADICTION, f"mm/ksm.c allows no such difference: {rule.rule}"
    return Entry(
        rule.counter, entry.first, entry.last, entry.delta, rule.say, difference, verdict, why
    )


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
    begin_ns = sample.begin_ns - SKEW_NS
    one_by_one = of_kind(recorded.events, *ONE_BY_ONE)
    before = one_by_one["ts_ns"][one_by_one["ts_ns"] < sample.begin_ns]
    if len(before):
        begin_ns = min(begin_ns, int(before.max()))
    return begin_ns, sample.end_ns + SKEW_NS


def _within(ts_ns: npt.NDArray[np.uint64], begin_ns: int, end_ns: int) -> npt.NDArray[np.bool_]:
    within: npt.NDArray[np.bool_] = (ts_ns >= begin_ns) & (ts_ns <= end_ns)
    return within
