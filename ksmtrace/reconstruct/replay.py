"""Reconstruction at any point in time of a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ksmtrace.events import Events
from ksmtrace.reconstruct.fold import Fold
from ksmtrace.reconstruct.snapshot import take_snapshot
from ksmtrace.reconstruct.state import Incomplete, TreeState
from ksmtrace.stream import (
    Batch,
    CounterSample,
    Item,
    Losses,
    ProcessSeen,
    Stream,
    Trailer,
    time_of,
)

CHECKPOINT_EVENTS = 1 << 21
"""At most so many events are folded again for a time that was passed before."""

MOST_CHECKPOINTS = 8
"""Each holds all that is known at its time. With more, every other one is given up."""


def told_ns(events: Events, after_ns: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return from when on each event was known, shape (n,), rising.

    An event tells of its ``ts_ns``, but cmp_and_merge_page of the time when the visit began, and
    of what it came to: that was known when the events before it in the ring had happened.

    Args:
        events: in the ring's order, shape (n,).
        after_ns: from when on the event before them was known.
    """
    known = np.maximum.accumulate(events["ts_ns"])
    return np.maximum(known, np.uint64(after_ns))


@dataclass(frozen=True)
class _Checkpoint:
    nr_items: int  # of the stream, that the fold has taken in
    known_ns: int  # from when on the last of them was known
    fold: Fold


class Replay:
    """A recording, to be asked for its state at one time after the other.

    The first question folds the recording up to that time and keeps copies of the fold on the
    way; a later one begins at the nearest copy before its time.

    Args:
        opened: opens the recording; called once per question.
    """

    def __init__(self, opened: Callable[[], Stream]) -> None:
        self._open = opened
        self._checkpoints: list[_Checkpoint] = []
        self._spacing = CHECKPOINT_EVENTS
        self.nr_folded = 0
        """Events folded so far, over all questions."""

    def state_at(self, at_ns: int | None = None) -> TreeState:
        """Reconstruct the state at a time.

        Args:
            at_ns: CLOCK_MONOTONIC; None for the end. What happened at that very time counts.
        """
        stream = self._open()
        fold, nr_items, known_ns = Fold(stream.header), 0, 0
        for checkpoint in self._checkpoints:
            if at_ns is None or checkpoint.fold.last_ns <= at_ns:
                fold = checkpoint.fold.copy()
                nr_items, known_ns = checkpoint.nr_items, checkpoint.known_ns
        last = fold.nr_events
        come = fold.nr_taken
        entered: list[tuple[int, int]] = []
        passed = tallied = False
        for item in islice(iter(stream), nr_items, None):
            nr_items += 1
            if isinstance(item, Batch):
                if not len(item.events):
                    continue
                come += len(item.events)
                known = told_ns(item.events, known_ns)
                passed = at_ns is not None and int(known[-1]) > at_ns
                until = len(known) if at_ns is None else int((known <= np.uint64(at_ns)).sum())
                fold.take_events(item.events[:until])
                self.nr_folded += until
                known_ns = int(known[-1])
            elif at_ns is None or time_of(item) <= at_ns or isinstance(item, ProcessSeen):
                fold.take(item)
            elif isinstance(item, Losses) and not tallied:
                # What was lost by then is in the first reading of the tallies afterwards.
                fold.take_losses(item)
                tallied = True
            if isinstance(item, Losses):
                nr_entered = sum(item.produced.values()) - sum(item.dropped.values())
                entered.append((nr_entered, item.ts_ns))
            # Events come some time after what else is told of their time.
            if passed and tallied:
                break
            if not passed and not tallied and fold.nr_taken - last >= self._spacing:
                last = fold.nr_taken
                self._keep(_Checkpoint(nr_items, known_ns, fold.copy()))
        if at_ns is not None:
            fold.last_ns = at_ns
        # Until the last event there is, and until tallies of which all events are there.
        settled_ns = max(stream.header.started_ns, known_ns)
        settled_ns = max([settled_ns, *(ts_ns for nr, ts_ns in entered if nr <= come)])
        cut_off = getattr(stream, "cut_off", None)
        if cut_off and fold.last_ns > settled_ns:
            fold.incomplete.append(Incomplete(settled_ns, cut_off))
        return take_snapshot(fold)

    def _keep(self, checkpoint: _Checkpoint) -> None:
        if self._checkpoints and checkpoint.nr_items <= self._checkpoints[-1].nr_items:
            return
        self._checkpoints.append(checkpoint)
        if len(self._checkpoints) > MOST_CHECKPOINTS:
            self._checkpoints = self._checkpoints[1::2]
            self._spacing *= 2


def iter_states(stream: Stream) -> Iterator[tuple[CounterSample, TreeState]]:
    """Yield the state at every counter sample, with the sample.

    The events up to the end of a sample come after it in the stream, so that it is the state once
    the next item but events has come.
    """
    fold = Fold(stream.header)
    waiting: CounterSample | None = None
    held: list[Events] = []
    known_ns = 0

    def settle(until_ns: int | None) -> Iterator[Item]:
        nonlocal held, known_ns
        events, held = held, []
        for batch in events:
            known = told_ns(batch, known_ns)
            until = len(batch)
            if until_ns is not None:
                until = int(np.searchsorted(known, np.uint64(until_ns), side="right"))
            if until:
                known_ns = int(known[until - 1])
                yield Batch(batch[:until])
            if until < len(batch):
                held.append(batch[until:])

    for item in stream:
        if isinstance(item, Batch):
            held.append(item.events)
            continue
        if isinstance(item, CounterSample | Trailer):
            for events in settle(waiting.begin_ns if waiting else None):
                fold.take(events)
            if waiting:
                fold.last_ns = waiting.begin_ns
                yield waiting, take_snapshot(fold)
            waiting = item if isinstance(item, CounterSample) else None
        fold.take(item)
