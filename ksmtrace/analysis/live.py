"""A stream as it stands: folded item by item in bounded memory, and drawn as immutable pictures."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.books import SKEW_NS, Entry, iter_said
from ksmtrace.analysis.contention import Contention
from ksmtrace.analysis.merges import Merges
from ksmtrace.analysis.passes import find_speed
from ksmtrace.analysis.process_tally import LiveProcess, ProcessTally
from ksmtrace.analysis.rates import RateRing, Rates
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.analysis.tallies import (
    BooksTally,
    MergeFigures,
    MergeTally,
    Pass,
    PassTally,
)
from ksmtrace.analysis.topics import CauseFigures, CauseTally, PageFigures, PageTally, WaitTally
from ksmtrace.events import (
    KIND_BY_NAME,
    KINDS,
    NR_KINDS,
    EventFlag,
    Events,
    concatenate,
    of_kind,
    select,
)
from ksmtrace.reconstruct.content import order_by_sharers
from ksmtrace.reconstruct.fold import Fold
from ksmtrace.reconstruct.snapshot import take_snapshot
from ksmtrace.reconstruct.state import Incomplete, TreeState
from ksmtrace.stream import (
    Batch,
    CounterSample,
    Header,
    Item,
    Losses,
    ProcessSeen,
    StackSeen,
    Trailer,
    Witnessed,
    time_of,
)

CanSee = Callable[..., bool]

KEPT_SAMPLES = 600
KEPT_EVENTS = 20_000
KEPT_NAMES = 8_192
KEPT_NODES = 200

_MOST_TREE_SHARE = 5  # at most a fifth of the time goes into snapshots of the trees
_LEAST_TREE_NS = 1_000_000_000

_LOOKS = tuple(kind.name for kind in KINDS if kind.every_page)

RATES = {
    "attempts": "ksm_merge_with_ksm_page",
    "merged": "ksm_merge_with_ksm_page",
    "failed": "ksm_merge_with_ksm_page",
    "zero_merged": "ksm_merge_one_page",
    "nodes_freed": "ksm_remove_ksm_page",
    "sharers_removed": "ksm_remove_rmap_item",
    "left_singly": "remove_rmap_item_from_tree",
    "unmerges": "break_ksm",
    "migrated": "ksm_migrate_page",
}
"""What is counted per span of time, and the kind of event that tells of it; as
:func:`ksmtrace.analysis.merges.df_rates`, and the calls of break_ksm."""


@dataclass(frozen=True)
class PassFigures:
    """ksmd's passes.

    Attributes:
        completed: seen from beginning to end.
        median_ns: of the last :data:`ksmtrace.analysis.tallies.KEPT_PASSES` of them.
        longest_ns: of all of them.
        pages_per_cpu_second: :func:`ksmtrace.analysis.passes.find_speed` of all of them.
        last: the last passes, oldest first; the last one may be under way.
    """

    completed: int
    median_ns: int | None
    longest_ns: int | None
    pages_per_cpu_second: float | None
    last: tuple[Pass, ...]


@dataclass(frozen=True)
class SamplePoint:
    """What the graphs need of a counter sample; None: absent."""

    begin_ns: int
    cpu_ns: int | None
    pages_scanned: int | None
    pages_sharing: int | None
    cow_ksm: int | None


@dataclass(frozen=True)
class Trees:
    """The trees at one moment.

    Attributes:
        state: the reconstruction.
        most_shared: rows of its stable_nodes, most sharers first, at most :data:`KEPT_NODES`.
        owners: per row of these who shares the node, as (pid, pages), most pages first, at most
            three.
        took_ns: how long it took to put together.
    """

    state: TreeState
    most_shared: npt.NDArray[np.int64]
    owners: tuple[tuple[tuple[int, int], ...], ...]
    took_ns: int


@dataclass(frozen=True, eq=False)
class Picture:
    """Everything that is known of a stream at one moment; never changes.

    Attributes:
        header: the stream's.
        at_ns: CLOCK_MONOTONIC until which the stream was taken in.
        nr_events: events taken in.
        by_kind: how many by kind's name, of the kinds that the plan knows.
        only_counted: kinds that are counted in the kernel and have no events here.
        skipped: events that were not taken in, as drawing was behind: the books, the trees and the
            tables are incomplete by them, the kernel-side tallies are not.
        first_sample, sample: the first and the last counter sample.
        points: figures of the last samples, oldest first.
        losses: the last reading of the kernel-side tallies.
        rates: counts over time.
        merges: None where attempts are not observable.
        causes: why merges failed; None where attempts are not observable.
        pages: what became of pages; None where not observable.
        waits: what happened at each lock, by its name.
        zero_attempts, zero_merged: pages replaced by the zero page; None not observable.
        passes: None where not observable.
        processes: in the order in which they were first told of.
        processes_forgotten: processes that have left and are no longer listed.
        books: the counters beside what the events say; empty before the second sample.
        trees: as they were a moment ago; None before they were first put together.
        witnessed: the last reading of the kernel's own state.
        tail: the last events, in parts, oldest first.
        trailer: how the stream ended, None while it has not.
    """

    header: Header
    at_ns: int
    nr_events: int
    by_kind: Mapping[str, int]
    only_counted: tuple[str, ...]
    skipped: int
    first_sample: CounterSample | None
    sample: CounterSample | None
    points: tuple[SamplePoint, ...]
    losses: Losses | None
    rates: Rates
    merges: MergeFigures | None
    causes: CauseFigures | None
    pages: PageFigures | None
    waits: Mapping[str, Contention]
    zero_attempts: int | None
    zero_merged: int | None
    passes: PassFigures | None
    processes: tuple[LiveProcess, ...]
    processes_forgotten: int
    books: tuple[Entry, ...]
    trees: Trees | None
    witnessed: Witnessed | None
    tail: tuple[Events, ...]
    trailer: Trailer | None
    names: Mapping[int, ProcessSeen] = field(default_factory=dict)

    def recorded(self) -> Recorded:
        """Return a recording without events: what was caught, and what was lost."""
        losses = [self.losses] if self.losses else []
        return Recorded(self.header, concatenate([]), losses=losses)

    @property
    def nr_lost(self) -> int:
        """Events that found the ring full."""
        return sum(self.losses.dropped.values()) if self.losses else 0


class Live:
    """Takes in a stream and says at any time how it stands.

    Args:
        header: the stream's.
        with_trees: whether the trees are reconstructed.
    """

    def __init__(self, header: Header, with_trees: bool = True) -> None:
        self.header = header
        self.at_ns = header.started_ns
        self.skipped = 0
        self._seen_by = Recorded(header, concatenate([]))
        self._fold = Fold(header) if with_trees else None
        self._trees: Trees | None = None
        self._trees_stale = True
        self._waiting: list[Events] = []
        self._by_kind = np.zeros(NR_KINDS, np.int64)
        self._rates = RateRing(header.started_ns, tuple(RATES))
        self._merges = MergeTally()
        self._passes = PassTally()
        self._causes = CauseTally(header)
        self._pages = PageTally(header)
        self._waits = WaitTally(header)
        self._processes = ProcessTally(header)
        self._books = BooksTally(header)
        self._zero = [0, 0]
        self._names: dict[int, ProcessSeen] = {}
        self._names_shown: dict[int, ProcessSeen] | None = None
        self._first_sample: CounterSample | None = None
        self._sample: CounterSample | None = None
        self._unsettled: CounterSample | None = None
        self._unaccounted: CounterSample | None = None
        self._points: deque[SamplePoint] = deque(maxlen=KEPT_SAMPLES)
        self._losses: Losses | None = None
        self._tail: deque[Events] = deque()
        self._nr_tail = 0
        self._witnessed: Witnessed | None = None
        self._trailer: Trailer | None = None
        self._skip_told: int | None = None

    def copy(self) -> Live:
        """Return one of its own that has taken in the same."""
        self._settle_events()
        never_change = (
            *(self.header, self._trees, self._witnessed, self._trailer, self._losses),
            *(self._first_sample, self._sample, self._unsettled, self._unaccounted),
            *self._points,
            *self._names.values(),
            *self._tail,
        )
        memo = {id(one): one for one in never_change}
        copied = Live.__new__(Live)
        for name, value in vars(self).items():
            one = value.copy() if isinstance(value, Fold) else copy.deepcopy(value, memo)
            setattr(copied, name, one)
        return copied

    # ---- the stream ----

    def take(self, item: Item) -> None:
        """Take in the stream's next item."""
        if isinstance(item, Batch):
            if len(item.events):
                self._waiting.append(item.events)
            return
        if isinstance(item, CounterSample):
            self._settle_sample()
            self._take_sample(item)
        elif isinstance(item, Losses):
            self._settle_events()
            self._losses = item
            self._books.take_losses(item)
        elif isinstance(item, ProcessSeen):
            self._names[item.pid] = item
            if len(self._names) > KEPT_NAMES:
                self._names.pop(next(iter(self._names)))
            self._names_shown = None
        elif isinstance(item, StackSeen):
            self._waits.take_stack(item)
        elif isinstance(item, Witnessed):
            self._settle_events()
            self._witnessed = item
        elif isinstance(item, Trailer):
            self._settle_sample()
            self._trailer = item
        self.at_ns = max(self.at_ns, time_of(item))
        if self._fold is not None:
            self._fold.take(item)
            self._fold.forget_names(KEPT_NAMES)
            self._trees_stale = True

    def skip(self, by_kind: npt.NDArray[np.int64]) -> None:
        """Leave events out, as drawing is behind; from then on what needs them is unknown.

        Args:
            by_kind: how many of them there are by the number of their kind, shape (NR_KINDS,).
        """
        self.skipped += int(by_kind.sum())
        self._by_kind += by_kind
        self._books.skipped = self.skipped
        if self._fold is not None:
            why = f"{self.skipped:,} events were not taken in, as drawing was behind"
            if self._skip_told is None:
                self._skip_told = len(self._fold.incomplete)
                self._fold.incomplete.append(Incomplete(self.at_ns, why))
            told = self._fold.incomplete[self._skip_told]
            self._fold.incomplete[self._skip_told] = replace(told, why=why)

    def _take_sample(self, sample: CounterSample) -> None:
        self._first_sample = self._first_sample or sample
        self._sample = self._unsettled = self._unaccounted = sample
        self._points.append(
            SamplePoint(
                sample.begin_ns,
                sample.ksmd.get("cpu_ns"),
                _number(sample.ksm.get("pages_scanned")),
                _number(sample.ksm.get("pages_sharing")),
                sample.vmstat.get("cow_ksm"),
            )
        )

    def _settle_sample(self, all_have_come: bool = True) -> None:
        # The events up to the end of a sample come after it in the stream.
        self._settle_events()
        if self._unaccounted is not None and all_have_come:
            self._books.settle(self._unaccounted)
            self._unaccounted = None
        if self._unsettled is not None:
            self._processes.take_sample(self._unsettled)
            self._unsettled = None

    def _have_all_come(self) -> bool:
        # All that had been produced when the tallies after the last sample were read.
        losses, sample = self._losses, self._sample
        if losses is None or sample is None or losses.ts_ns < sample.end_ns:
            return False
        entered = sum(losses.produced.values()) - sum(losses.dropped.values())
        return entered <= int(self._by_kind.sum())

    def settle(self) -> None:
        """Fold what has been taken in: else the next picture does."""
        self._settle_events()

    def _settle_events(self) -> None:
        if not self._waiting:
            return
        events = self._waiting[0] if len(self._waiting) == 1 else concatenate(self._waiting)
        self._waiting = []
        recorded = Recorded(self.header, events)
        self._by_kind += np.bincount(events["kind"], minlength=NR_KINDS)
        merges = self._merges.take(events, self._by_appends())
        self._passes.take(events)
        self._causes.take(events)
        self._pages.take(events)
        self._waits.take(events)
        self._passes.add_merged(np.sort(merges.events["ts_ns"][merges.appended]))
        self._processes.take(events, merges)
        self._books.take(recorded, iter_said(recorded, merges))
        zero = of_kind(events, "ksm_merge_one_page")
        self._zero[0] += len(zero)
        self._zero[1] += int(np.count_nonzero(zero["err"] == 0))
        self._take_rates(events, merges, zero)
        self._keep_tail(events)
        if self._fold is not None:
            self._fold.take_events(events)
            self._fold.settle()
            self._trees_stale = True
        told_ns = int(events["ts_ns"].max())
        self.at_ns = max(self.at_ns, told_ns)
        if self._unaccounted is not None and told_ns > self._unaccounted.end_ns + SKEW_NS:
            self._settle_sample()

    def _by_appends(self) -> bool:
        dropped = self._losses.dropped if self._losses else {}
        return self._seen_by.can_see("stable_tree_append") and not (
            self.skipped
            or dropped.get("ksm_merge_with_ksm_page")
            or dropped.get("stable_tree_append")
        )

    def _take_rates(self, events: Events, merges: Merges, zero: Events) -> None:
        left = of_kind(events, "remove_rmap_item_from_tree")
        chosen = {
            "attempts": merges.events,
            "merged": select(merges.events, merges.appended),
            "failed": select(merges.events, merges.failed | merges.undone),
            "zero_merged": select(zero, zero["err"] == 0),
            "nodes_freed": of_kind(events, "ksm_remove_ksm_page"),
            "sharers_removed": of_kind(events, "ksm_remove_rmap_item"),
            "left_singly": select(left, ~has_flag(left, EventFlag.NODE_FREED)),
            "unmerges": of_kind(events, "break_ksm"),
            "migrated": of_kind(events, "ksm_migrate_page"),
        }
        for name, of in chosen.items():
            self._rates.take(name, of["ts_ns"])

    def _keep_tail(self, events: Events) -> None:
        looks = np.isin(events["kind"], [KIND_BY_NAME[name].number for name in _LOOKS])
        rare = select(events, ~looks) if looks.any() else events
        part = rare[-KEPT_EVENTS:].copy()
        if not len(part):
            return
        self._tail.append(part)
        self._nr_tail += len(part)
        while self._nr_tail - len(self._tail[0]) >= KEPT_EVENTS:
            self._nr_tail -= len(self._tail.popleft())
        if len(self._tail) > 256:
            self._tail = deque([concatenate(list(self._tail))[-KEPT_EVENTS:]])
            self._nr_tail = len(self._tail[0])

    # ---- what is drawn ----

    def picture(self, at_ns: int | None = None, all_of_it: bool = False) -> Picture:
        """Say how the stream stands.

        Args:
            at_ns: now, CLOCK_MONOTONIC; None: when its last item was.
            all_of_it: nothing more will come for now: settle the last sample, with the books where
                all events before it have come, and put the trees together however long that takes.
        """
        self._settle_events()
        if all_of_it:
            self._settle_sample(self._have_all_come())
        self.at_ns = max(self.at_ns, at_ns or 0)
        if self._names_shown is None:
            self._names_shown = dict(self._names)
        can_see = self._seen_by.can_see
        by_appends = self._by_appends()
        rest = self._merges.rest(by_appends)
        known = {entry["event"] for entry in self.header.plan}
        return Picture(
            header=self.header,
            at_ns=self.at_ns,
            nr_events=int(self._by_kind.sum()) - self.skipped,
            by_kind={
                kind.name: int(self._by_kind[kind.number]) for kind in KINDS if kind.name in known
            },
            only_counted=tuple(
                name
                for name in _LOOKS
                if self._seen_by.only_counted(name) and not self._by_kind[KIND_BY_NAME[name].number]
            ),
            skipped=self.skipped,
            first_sample=self._first_sample,
            sample=self._sample,
            points=tuple(self._points),
            losses=self._losses,
            rates=self._rates.shown(self.at_ns, lambda name: can_see(RATES[name])),
            merges=(
                self._merges.figures(by_appends) if can_see("ksm_merge_with_ksm_page") else None
            ),
            causes=(
                self._causes.figures(self.at_ns) if can_see("ksm_merge_with_ksm_page") else None
            ),
            pages=self._pages.figures() if can_see("page_outcomes") else None,
            waits=self._waits.figures(self._losses, self._names, all_of_it),
            zero_attempts=self._zero[0] if can_see("ksm_merge_one_page") else None,
            zero_merged=self._zero[1] if can_see("ksm_merge_one_page") else None,
            passes=self._pass_figures(rest),
            processes=self._processes.processes(self.at_ns, rest, self._names),
            processes_forgotten=self._processes.forgotten,
            books=self._books.entries,
            trees=self._take_trees(all_of_it),
            witnessed=self._witnessed,
            tail=tuple(self._tail),
            trailer=self._trailer,
            names=self._names_shown,
        )

    def _pass_figures(self, rest: Merges) -> PassFigures | None:
        if not self._seen_by.can_see("ksm_start_scan", "ksm_stop_scan"):
            return None
        passes = self._passes
        durations = passes.durations()
        last = passes.last(64)
        if last and last[-1].end_ns is None:
            last[-1].merged += int(rest.appended.sum())
        return PassFigures(
            passes.completed,
            int(np.median(durations)) if len(durations) else None,
            passes.longest_ns,
            find_speed(passes.rmap_entries, passes.cpu_ns, passes.completed),
            last,
        )

    def _take_trees(self, all_of_it: bool) -> Trees | None:
        if self._fold is None:
            return None
        begin_ns = time.monotonic_ns()
        if self._trees is not None:
            if not self._trees_stale:
                return self._trees
            wait_ns = max(_LEAST_TREE_NS, self._trees.took_ns * _MOST_TREE_SHARE)
            if not all_of_it and begin_ns < self._trees_ns + wait_ns:
                return self._trees
        state = take_snapshot(self._fold)
        self._trees_ns = time.monotonic_ns()
        chosen = order_by_sharers(state)[:KEPT_NODES]
        owners = _owners(state, chosen)
        self._trees = Trees(state, chosen, owners, time.monotonic_ns() - begin_ns)
        self._trees_stale = False
        return self._trees

    _trees_ns = 0


def _owners(
    state: TreeState, nodes: npt.NDArray[np.int64]
) -> tuple[tuple[tuple[int, int], ...], ...]:
    place = np.full(len(state.stable_nodes) + 1, -1, np.int64)  # the last for sharers of none
    place[nodes] = np.arange(len(nodes))
    at = place[state.rmap_items["stable_node"]]
    chosen = at >= 0
    pids = state.rmap_items["pid"][chosen].astype(np.int64)
    pairs, counts = np.unique((at[chosen] << 32) | pids, return_counts=True)
    found: list[list[tuple[int, int]]] = [[] for _ in nodes]
    for pair, pages in zip(pairs.tolist(), counts.tolist(), strict=True):
        found[pair >> 32].append((pair & 0xFFFF_FFFF, pages))
    return tuple(tuple(sorted(one, key=lambda own: -own[1])[:3]) for one in found)


def _number(value: int | str | None) -> int | None:
    return value if isinstance(value, int) else None
