"""What becomes of pages, why merges fail and who waits, in a stream as it comes.

The report's analyses (:mod:`ksmtrace.analysis.outcomes`, :mod:`ksmtrace.analysis.contention`) of a
part at a time, in bounded memory.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ksmtrace.analysis.addresses import places_of
from ksmtrace.analysis.contention import Contention, find_contention
from ksmtrace.analysis.outcomes import CAUSES, INFERRED, SEEN, df_failures, df_page_outcomes
from ksmtrace.analysis.rates import RateRing, Rates
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.capture.hooks import WAITED_BY
from ksmtrace.events import KIND_BY_NAME, Events, concatenate, of_kind, select
from ksmtrace.stream import Header, Losses, ProcessSeen, StackSeen

KEPT_WAITS = 20_000
_KEPT_WORST = 8
_KEPT_PASSES = 8
_MOST_HELD = 1 << 14
_MOST_SHARE = 10  # at most a tenth of the time goes into waits
_LEAST_NS = 1_000_000_000

_CAUSE_KINDS = (
    *("ksm_merge_with_ksm_page", "merge_failure"),
    *("split_huge_page_to_list", "try_to_merge_one_page"),
)
_WAIT_KINDS = ("lock_wait", "lock_hold", *WAITED_BY.values())
_NAMES = tuple(cause.name for cause in CAUSES)


@dataclass(frozen=True)
class CauseFigures:
    """Why merges failed.

    Attributes:
        failures: by cause, in the order of :data:`ksmtrace.analysis.outcomes.CAUSES`.
        seen, inferred: how many of them are certain, and likely.
        rates: by cause, over time.
    """

    failures: Mapping[str, int]
    seen: Mapping[str, int]
    inferred: Mapping[str, int]
    rates: Rates


class CauseTally:
    """Counts failures by cause; what the last attempt tells is held back until the next one."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._counts: Counter[tuple[str, str]] = Counter()
        self._rates = RateRing(header.started_ns, _NAMES)
        self._held = concatenate([])

    def take(self, events: Events) -> None:
        """Take in the next events."""
        told = of_kind(events, *_CAUSE_KINDS)
        if not len(told):
            return
        events = concatenate([self._held, told])
        attempts = places_of(events, "ksm_merge_with_ksm_page")
        # What tells of an attempt comes before it, and until the next one.
        until = int(attempts[-1]) if len(attempts) else 0
        if len(events) - until > _MOST_HELD:
            until = len(events)
        self._held = events[until:].copy()
        for ts_ns, cause, certainty in self._failures(events[:until]):
            self._counts[cause, certainty] += 1
            self._rates.take(cause, np.array([ts_ns], np.uint64))

    def _failures(self, events: Events) -> list[tuple[int, str, str]]:
        told = of_kind(events, "ksm_merge_with_ksm_page", "merge_failure")
        if not len(told) or not (told["err"] != 0).any():
            return []
        table = df_failures(Recorded(self._header, events))
        return list(zip(table["ts_ns"], table["cause"], table["certainty"], strict=True))

    def figures(self, at_ns: int) -> CauseFigures:
        """Count all failures until a time, with what is held back."""
        held = self._failures(self._held)
        counts = self._counts + Counter((cause, certainty) for _, cause, certainty in held)
        failures: Counter[str] = Counter()
        for (cause, _), count in counts.items():
            failures[cause] += count
        names = [name for name in _NAMES if failures[name]]
        return CauseFigures(
            {name: failures[name] for name in names},
            {name: counts[name, SEEN] for name in names},
            {name: counts[name, INFERRED] for name in names},
            self._rates.shown(at_ns, lambda name: bool(failures[name])),
        )


@dataclass(frozen=True)
class PageFigures:
    """What became of the pages that ksmd came by, pages by outcome.

    Attributes:
        total: since the start.
        passes: the last passes, oldest first, by ksm_scan.seqnr; the last one may be under way.
    """

    total: Mapping[str, int]
    passes: tuple[tuple[int, Mapping[str, int]], ...]


class PageTally:
    """Counts what became of pages, in all and pass by pass."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._total: Counter[str] = Counter()
        self._passes: deque[tuple[int, Counter[str]]] = deque(maxlen=_KEPT_PASSES)

    def take(self, events: Events) -> None:
        """Take in the next events."""
        told = of_kind(events, "page_outcomes", "ksm_start_scan")
        if not len(of_kind(told, "page_outcomes")):
            for seq in told["seq"].tolist():
                self._passes.append((seq, Counter()))
            return
        begun = of_kind(told, "ksm_start_scan")["seq"].tolist()
        table = df_page_outcomes(Recorded(self._header, told))
        parts: list[Counter[str]] = [Counter() for _ in range(len(begun) + 1)]
        for number, outcome, pages in zip(
            table["pass_number"].fillna(0).astype("int64").tolist(),
            table["outcome"].tolist(),
            table["pages"].tolist(),
            strict=True,
        ):
            parts[number][outcome] += pages
            self._total[outcome] += pages
        if self._passes:
            self._passes[-1][1].update(parts[0])
        self._passes.extend(zip(begun, parts[1:], strict=True))

    def figures(self) -> PageFigures:
        """Return the counts so far."""
        passes = tuple((seq, dict(counts)) for seq, counts in self._passes)
        return PageFigures(dict(self._total), passes)


class WaitTally:
    """Follows waits for locks: all by the kernel side's tallies, the last ones by events.

    Who waited, and for whom, is of the last :data:`KEPT_WAITS` events; the worst ones are of all.
    """

    def __init__(self, header: Header) -> None:
        self._header = header
        self._parts: deque[Events] = deque()
        self._nr_kept = 0
        self._stacks: dict[int, list[str]] = {}
        self._longest = concatenate([])  # of those that are not kept any more
        self._shown: Mapping[str, Contention] = {}
        self._shown_of: tuple[object, ...] = ()
        self._shown_ns = self._took_ns = 0
        self._nr_taken = 0

    def take(self, events: Events) -> None:
        """Take in the next events."""
        part = of_kind(events, *_WAIT_KINDS)
        if not len(part):
            return
        self._nr_taken += len(part)
        self._parts.append(part[-KEPT_WAITS:].copy())
        self._nr_kept += len(self._parts[-1])
        while self._nr_kept - len(self._parts[0]) >= KEPT_WAITS:
            gone = self._parts.popleft()
            self._nr_kept -= len(gone)
            self._longest = _longest(concatenate([self._longest, gone]))
        if len(self._parts) > 256:
            self._parts = deque([concatenate(list(self._parts))])

    def take_stack(self, stack: StackSeen) -> None:
        """Take in a stack that events name."""
        self._stacks[stack.number] = stack.frames

    def figures(
        self, losses: Losses | None, seen: Mapping[int, ProcessSeen], now: bool
    ) -> Mapping[str, Contention]:
        """Return what happened at each lock, by its name.

        Args:
            losses: the last reading of the kernel side's tallies.
            seen: who each pid is now.
            now: however long it takes; else it may be of a moment ago.
        """
        of = (self._nr_taken, losses and (losses.counted, losses.histograms))
        begin_ns = time.monotonic_ns()
        wait_ns = max(_LEAST_NS, self._took_ns * _MOST_SHARE)
        # What was shown without tallies says that there are none: the first ones are not put off.
        has_tallies = bool(self._shown) and self._shown_of[1] is not None
        if of == self._shown_of or (
            has_tallies and not now and begin_ns < self._shown_ns + wait_ns
        ):
            return self._shown
        recorded = Recorded(
            self._header,
            concatenate(list(self._parts)),
            seen={pid: [one] for pid, one in seen.items()},
            stacks=self._stacks,
            losses=[losses] if losses else [],
        )
        self._shown = find_contention(recorded)
        if len(self._longest):
            recorded.events = concatenate([self._longest, recorded.events])
            ever = find_contention(recorded)
            self._shown = {
                name: replace(one, worst=ever[name].worst, worst_holds=ever[name].worst_holds)
                for name, one in self._shown.items()
            }
        self._shown_of = of
        self._shown_ns = time.monotonic_ns()
        self._took_ns = self._shown_ns - begin_ns
        return self._shown


def _longest(events: Events) -> Events:
    order = np.argsort(events["duration_ns"], kind="stable")
    is_hold = (events["kind"] == KIND_BY_NAME["lock_hold"].number)[order]
    sides = events["lock"][order].astype(np.int64) * 2 + is_hold
    chosen = [order[sides == side][-_KEPT_WORST:] for side in np.unique(sides)]
    found = select(events, np.sort(np.concatenate(chosen)))
    return found
