"""One moment of what is shown; replaced as a whole, and never changed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ksmtrace.analysis.live import Picture
    from ksmtrace.claims.judgement import Judgement
    from ksmtrace.stream import CounterSample


class Phase(Enum):
    """What the engine is doing."""

    STARTING = "starting"
    LIVE = "live"
    PLAYING = "playing"
    PAUSED = "paused"
    SEEKING = "seeking"
    ENDED = "ended"
    FAILED = "failed"


@dataclass(frozen=True)
class Position:
    """Where a replay is.

    Attributes:
        at_ns: since the recording began.
        length_ns: of the whole recording.
        speed: recorded seconds per second.
        complete: None while unknown, else why the file is incomplete, "" where it is not.
    """

    at_ns: int
    length_ns: int
    speed: float
    cut_off: str = ""


@dataclass(frozen=True)
class Recorder:
    """A recording that is being made of what is on the screen.

    Attributes:
        path: the file.
        nr_events: written so far.
        written_bytes: its size.
        says: why it ended, "" while it goes on.
    """

    path: Path
    nr_events: int
    written_bytes: int
    says: str = ""


@dataclass(frozen=True)
class PageSavings:
    """What the page tables say of merging, read from outside KSM.

    Attributes:
        at_ns: CLOCK_MONOTONIC after the reading.
        frames: merged frames that mergeable memory maps.
        places: at how many places.
        zero_places: places that map the zero page.
        why_not: why there is no reading, "" where there is one.
        trusted: whether the kernel tells KSM pages from other shared ones.
    """

    at_ns: int
    frames: int = 0
    places: int = 0
    zero_places: int = 0
    why_not: str = ""
    trusted: bool = True

    @property
    def saved_pages(self) -> int:
        """Pages of memory that merging saves, by what is mapped."""
        return self.places - self.frames


@dataclass(frozen=True)
class Judged:
    """The claims, as judged last.

    Attributes:
        judgements: one per claim.
        of: what they were judged on, in words.
        why_not: why they were not judged, "" where they were.
        took_s: how long that took.
    """

    judgements: tuple[Judgement, ...] = ()
    of: str = ""
    why_not: str = ""
    took_s: float = 0.0


@dataclass(frozen=True)
class Shown:
    """Everything that the screen may show at one moment.

    Attributes:
        number: counts the moments.
        phase: what the engine is doing.
        says: why, in words; "" where there is nothing to say.
        picture: the stream, None before it has begun.
        early: the counters before the stream has begun.
        position: None for a live capture.
        recorder: None where nothing was recorded from here.
        can_record: since when a recording begun now would tell, CLOCK_MONOTONIC; None: nothing.
        savings: by the page tables, None where nobody asked.
        waiting: events that wait to be folded.
        judged: the claims; None while nobody has asked.
    """

    number: int = 0
    phase: Phase = Phase.STARTING
    says: str = ""
    picture: Picture | None = None
    early: CounterSample | None = None
    position: Position | None = None
    recorder: Recorder | None = None
    can_record: int | None = None
    savings: PageSavings | None = None
    waiting: int = 0
    judged: Judged | None = None

    @property
    def sample(self) -> CounterSample | None:
        """The counters' last sample: of the stream, or until it has one, of before."""
        if self.picture is None or self.picture.sample is None:
            return self.early
        return self.picture.sample
