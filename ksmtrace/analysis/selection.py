"""Restricts what was gathered to a span of time, or to some processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.lives import find_lives, has_mm
from ksmtrace.analysis.recorded import EVER_NS, Recorded, Selection, has_flag
from ksmtrace.events import EventFlag, Events, select
from ksmtrace.stream import Losses


def between(recorded: Recorded, begin_ns: int | None, end_ns: int | None) -> Recorded:
    """Return what happened in a span of the recording, from its begin to before its end.

    Every event, sample and tally is in exactly one of two adjacent spans. The tallies become
    differences: what was counted from the last one before the span to each one in it, so that
    those of adjacent spans add up too. Analyses tell what became of something within the span
    (an attempt to merge, say) by the whole recording.

    Args:
        recorded: a whole recording.
        begin_ns: CLOCK_MONOTONIC; None is the recording's begin.
        end_ns: CLOCK_MONOTONIC; None is the recording's end, and includes it.

    Raises:
        ValueError: the span is empty, or the recording is not whole.
    """
    if recorded.selection is not None:
        raise ValueError("a span is taken of a whole recording")
    first_ns, last_ns = recorded.begin_ns(), recorded.end_ns()
    low_ns = 0 if begin_ns is None or begin_ns <= first_ns else begin_ns
    high_ns = EVER_NS if end_ns is None or end_ns > last_ns else end_ns
    if max(low_ns, first_ns) >= min(high_ns, last_ns):
        raise ValueError("an empty span")
    before = [losses for losses in recorded.losses if losses.ts_ns < low_ns]
    lost, reasons = _incomplete(recorded, low_ns, high_ns)
    span = Selection(
        of=recorded,
        begin_ns=max(low_ns, first_ns),
        end_ns=min(high_ns, last_ns),
        low_ns=low_ns,
        high_ns=high_ns,
        pids=None,
        tallies_begin_ns=before[-1].ts_ns if before else first_ns,
        lost=lost,
        why_incomplete=reasons,
        chooses=lambda events: span.holds(events["ts_ns"]),
    )
    tallies = [losses for losses in recorded.losses if span.holds(losses.ts_ns)]
    return dataclasses.replace(
        recorded,
        events=select(recorded.events, span.chooses(recorded.events)),
        samples=[one for one in recorded.samples if span.holds([one.begin_ns, one.end_ns]).all()],
        losses=[_since(before[-1], one) for one in tallies] if before else tallies,
        witnessed=[
            one for one in recorded.witnessed if span.holds([one.begin_ns, one.end_ns]).all()
        ],
        selection=span,
    )


def of_pids(recorded: Recorded, pids: Collection[int]) -> Recorded:
    """Return what concerns some processes, by their pids.

    Events that tell of an mm are those of its owner, whoever caused them; events of no mm
    (passes, stable_nodes, migrations) stay, and so do counters and tallies, which the kernel
    keeps for all processes together. A sample keeps the figures of these processes only.

    Args:
        recorded: a whole recording, or a span of one.
        pids: owners' tgids, as in :attr:`ksmtrace.analysis.processes.Process.pid`.

    Raises:
        ValueError: the processes were chosen already.
    """
    if recorded.selection is not None and recorded.selection.pids is not None:
        raise ValueError("the processes were chosen already")
    lives = find_lives(recorded.whole())
    wanted = np.array([life.pid in pids for life in lives.lives], bool)

    def chooses(events: Events) -> npt.NDArray[np.bool_]:
        known = has_mm(events)
        owned = ~known & has_flag(events, EventFlag.PID_IS_OWNER)
        chosen: npt.NDArray[np.bool_] = ~known & ~owned
        chosen[known] = wanted[lives.of(select(events, known))]
        chosen[owned] = np.isin(events["pid"][owned], list(pids))
        return chosen

    span = recorded.selection
    return dataclasses.replace(
        recorded,
        events=select(recorded.events, chooses(recorded.events)),
        samples=[
            dataclasses.replace(
                sample, processes={p: stat for p, stat in sample.processes.items() if p in pids}
            )
            for sample in recorded.samples
        ],
        selection=Selection(
            of=recorded,
            begin_ns=recorded.begin_ns(),
            end_ns=recorded.end_ns(),
            low_ns=span.low_ns if span else 0,
            high_ns=span.high_ns if span else EVER_NS,
            pids=frozenset(pids),
            tallies_begin_ns=span.tallies_begin_ns if span else recorded.begin_ns(),
            lost=recorded.lost(),
            why_incomplete=recorded.why_incomplete(),
            chooses=chooses,
        ),
    )


def _incomplete(
    recorded: Recorded, low_ns: int, high_ns: int
) -> tuple[Mapping[str, int], list[str]]:
    """Return the events lost in the span, at most, and why the span is not whole.

    A loss is dated by the tallies before and after it. In a file that was cut off, a span is
    whole if a later tally is in the file, and as many events as had been produced by then.
    """
    after = [losses for losses in recorded.losses if losses.ts_ns >= high_ns]
    if not after and recorded.trailer is not None:
        after = recorded.losses[-1:]
    before = [losses for losses in recorded.losses if losses.ts_ns <= low_ns]
    last = after[0] if after else recorded.losses[-1] if recorded.losses else None
    if last is None:
        return {}, recorded.why_incomplete()
    dropped = _since(before[-1], last).dropped if before else last.dropped
    reasons = []
    if not after:
        reasons.append("the recording was cut off within the span, or just after it")
    elif recorded.trailer is None:
        entered = sum(last.produced.values()) - sum(last.dropped.values())
        if len(recorded.events) < entered:
            reasons.append(str(recorded.cut_off))
    total = sum(dropped.values())
    if total:
        kinds = ", ".join(f"{count} {name}" for name, count in dropped.items() if count)
        reasons.append(f"up to {total} events found the ring full and are lost ({kinds})")
    if recorded.trailer is not None:
        reasons += recorded.why_not_all()
    return dropped, reasons


def _since(before: Losses, after: Losses) -> Losses:
    """Return what was counted between two tallies."""
    names = [field.name for field in dataclasses.fields(Losses) if field.name != "ts_ns"]
    return dataclasses.replace(
        after, **{name: _minus(getattr(after, name), getattr(before, name)) for name in names}
    )


def _minus(after: Any, before: Any) -> Any:
    if after is None or before is None:
        return after
    if isinstance(after, Mapping):
        return {name: _minus(count, before.get(name)) for name, count in after.items()}
    if isinstance(after, list):
        return [_minus(count, other) for count, other in zip(after, before, strict=True)]
    return after - before
