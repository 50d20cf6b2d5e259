"""A part of a running stream as a recording of its own: from the moment before it was asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ksmtrace.events import KIND_BY_NAME, KINDS, NR_KINDS
from ksmtrace.recording.writer import RecordingWriter
from ksmtrace.stream import (
    Batch,
    CounterSample,
    Header,
    Item,
    Losses,
    ProcessSeen,
    StackSeen,
    Trailer,
)

MOST_EVENTS = 1_000_000
"""So many events are remembered at most: 56 MB."""

MOST_AGE_NS = 60_000_000_000
_MOST_NAMES = 8_192

Counts = npt.NDArray[np.int64]


@dataclass
class _Span:
    # What came from one counter sample on, until the next one.
    sample: CounterSample
    taken_before: Counts  # events by kind that the stream had yielded before
    items: list[Item] = field(default_factory=list)
    nr_events: int = 0
    losses: Losses | None = None


class Backlog:
    """Remembers the last moments of a stream, and goes on as a recording when asked to.

    What is remembered begins with a counter sample and its tallies, at most a minute old; where
    events come so fast that the time since the last sample is more than :data:`MOST_EVENTS`,
    nothing is remembered until the next sample.

    Args:
        header: the stream's.
    """

    def __init__(self, header: Header) -> None:
        self._header = header
        self._spans: deque[_Span] = deque()
        self._nr_events = 0
        self._taken = np.zeros(NR_KINDS, np.int64)
        self._names: dict[int, ProcessSeen] = {}
        self._stacks: dict[int, StackSeen] = {}  # as many as the kernel side has room for
        self._losses: Losses | None = None

    def take(self, item: Item) -> None:
        """Take in the stream's next item."""
        if isinstance(item, CounterSample):
            self._spans.append(_Span(item, self._taken.copy()))
        elif isinstance(item, ProcessSeen):
            self._names[item.pid] = item
            if len(self._names) > _MOST_NAMES:
                self._names.pop(next(iter(self._names)))
        elif isinstance(item, StackSeen):
            self._stacks[item.number] = item
        elif isinstance(item, Losses):
            self._losses = item
            if self._spans and self._spans[-1].losses is None:
                self._spans[-1].losses = item
        if self._spans:
            self._spans[-1].items.append(item)
        if isinstance(item, Batch):
            self._taken = self._taken + np.bincount(item.events["kind"], minlength=NR_KINDS)
            if self._spans:
                self._spans[-1].nr_events += len(item.events)
                self._nr_events += len(item.events)
        self._forget()

    def _forget(self) -> None:
        while self._spans and (
            self._nr_events > MOST_EVENTS
            or self._spans[-1].sample.begin_ns - self._spans[0].sample.begin_ns > MOST_AGE_NS
        ):
            self._nr_events -= self._spans.popleft().nr_events

    @property
    def begin_ns(self) -> int | None:
        """When what is remembered begins, CLOCK_MONOTONIC; None where nothing is."""
        return next((span.sample.begin_ns for span in self._spans if span.losses), None)

    def stream(self) -> Remembered | None:
        """Return what is remembered as a stream of its own; None where nothing is."""
        spans = [span for span in self._spans if span.losses]
        if not spans:
            return None
        header = _header_from(self._header, spans[0].sample)
        base = _base(spans[0])
        items: list[Item] = [*self._names.values(), *self._stacks.values()]
        for span in spans:
            items += [
                _since_base(item, base) if isinstance(item, Losses) else item for item in span.items
            ]
        last = self._losses
        items += _closing(
            self._taken - spans[0].taken_before,
            {entry["event"] for entry in header.plan},
            None if last is None else _since_base(last, base),
            "so far",
            spans[-1].sample.end_ns if last is None else last.ts_ns,
            [],
        )
        return Remembered(header, tuple(items))

    def record(self, path: Path) -> Excerpt | None:
        """Begin a recording with what is remembered; None where nothing is.

        Raises:
            UsageError: the file exists, or its directory does not.
            CannotRun: the file cannot be written.
        """
        spans = [span for span in self._spans if span.losses]
        if not spans:
            return None
        first = spans[0]
        excerpt = Excerpt(path, self._header, first.sample, _base(first))
        seen: list[Item] = [*self._names.values(), *self._stacks.values()]
        for item in seen:
            excerpt.write(item)
        for span in spans:
            for item in span.items:
                excerpt.write(item)
        return excerpt


def _base(span: _Span) -> Losses:
    # The tallies of what is not in the excerpt. An event that was produced and not yet taken from
    # the ring is in it, so that it is the events taken that count, and not those produced.
    losses = span.losses
    assert losses is not None
    produced = {
        name: int(span.taken_before[KIND_BY_NAME[name].number]) + losses.dropped.get(name, 0)
        for name in losses.produced
    }
    return replace(losses, produced=produced)


@dataclass(eq=False)
class Remembered:
    """A stream that ends in the middle: without a trailer."""

    header: Header
    items: tuple[Item, ...]

    def __iter__(self) -> Iterator[Item]:
        """Yield the items once."""
        return iter(self.items)


def _header_from(header: Header, first: CounterSample) -> Header:
    since_ns = first.begin_ns - header.started_ns
    return replace(
        header,
        started_ns=first.begin_ns,
        started_realtime_ns=header.started_realtime_ns + since_ns,
        settings={**header.settings, "excerpt_after_ns": since_ns},
    )


class Excerpt:
    """A recording that begins and ends in the middle of a stream.

    Its tallies count from its own beginning.

    Args:
        path: the file; created with mode 0600.
        header: the stream's.
        first: the counter sample that it begins with.
        base: the tallies of what came before it.
    """

    def __init__(self, path: Path, header: Header, first: CounterSample, base: Losses) -> None:
        self._base = base
        self._kinds = {entry["event"] for entry in header.plan}
        self._last: Losses | None = None
        self._last_sample = first
        self._recorded = np.zeros(NR_KINDS, np.int64)
        self._writer = RecordingWriter(path, _header_from(header, first))
        self.path = path
        self.ended = False

    @property
    def nr_events(self) -> int:
        """Events written so far."""
        return int(self._recorded.sum())

    @property
    def written_bytes(self) -> int:
        """Size of the file so far."""
        return self._writer.written_bytes

    def write(self, item: Item) -> None:
        """Append the stream's next item; its trailer ends the recording.

        Raises:
            CannotRun: the file cannot be written; what was written before stays readable.
        """
        if isinstance(item, Trailer):
            self.end(item.reason, item.ts_ns, item.notices)
            return
        if isinstance(item, Batch):
            self._recorded += np.bincount(item.events["kind"], minlength=NR_KINDS)
        elif isinstance(item, Losses):
            item = self._last = _since_base(item, self._base)
        elif isinstance(item, CounterSample):
            self._last_sample = item
        self._writer.write(item)

    def end(self, reason: str, ts_ns: int, notices: list[str] | None = None) -> None:
        """Write the trailer and close the file.

        Raises:
            CannotRun: the file cannot be written.
        """
        for item in _closing(self._recorded, self._kinds, self._last, reason, ts_ns, notices or []):
            self._writer.write(item)
        self._writer.close()
        self.ended = True

    def abandon(self) -> None:
        """Close the file as it is."""
        self._writer.abandon()
        self.ended = True


def _closing(
    counts: Counts,
    kinds: Collection[str],
    last: Losses | None,
    reason: str,
    ts_ns: int,
    notices: list[str],
) -> Iterator[Losses | Trailer]:
    recorded = {kind.name: int(counts[kind.number]) for kind in KINDS if kind.name in kinds}
    if last is not None:
        # What is still in the ring is not part of it.
        produced = {name: recorded[name] + last.dropped.get(name, 0) for name in last.produced}
        yield replace(last, ts_ns=ts_ns, produced=produced)
    yield Trailer(ts_ns, recorded, reason, notices=notices)


def _since_base(losses: Losses, base: Losses) -> Losses:
    return replace(
        losses,
        produced=_minus(losses.produced, base.produced),
        dropped=_minus(losses.dropped, base.dropped),
        counted=_minus(losses.counted, base.counted),
        missed=_minus(losses.missed, base.missed),
        histograms={
            name: [
                now - then
                for now, then in zip(
                    slots, base.histograms.get(name, [0] * len(slots)), strict=True
                )
            ]
            for name, slots in losses.histograms.items()
        },
        calls={
            name: [
                None if now is None else now - (then or 0)
                for now, then in zip(sides, base.calls.get(name, [0] * len(sides)), strict=True)
            ]
            for name, sides in losses.calls.items()
        },
    )


def _minus(now: Mapping[str, int], then: Mapping[str, int]) -> dict[str, int]:
    return {name: count - then.get(name, 0) for name, count in now.items()}
