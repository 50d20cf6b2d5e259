"""The engine of a live capture: drained by one thread, folded by another.

Where folding is behind, events are left out of the picture, counted, and still recorded; the drain
never waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ksmtrace.errors import KsmtraceError

from .engine import PICTURE_S, Engine
from .moment import PageSavings, Phase, Recorder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ksmtrace.analysis.live import Live
    from ksmtrace.recording.excerpt import Backlog, Excerpt, Remembered
    from ksmtrace.stream import Batch, CounterSample, Header, Item

MOST_WAITING_EVENTS = 1 << 20
"""More than that are left out of the picture: 56 MiB, a second's worth of a million a second."""

_TAKE_EVENTS = 1 << 16  # folded at a time: the thread that drains gets its turns in between
_IDLE_S = 0.02


class Capturing(Protocol):
    """What a live capture is to the engine (:class:`ksmtrace.capture.session.Capture`)."""

    header: Header
    progress: Any

    def __iter__(self) -> Iterator[Item]:
        """Yield the stream; asks ``until`` now and then whether to end."""
        ...

    def close(self) -> None:
        """Detach and unload everything."""
        ...


class LiveEngine(Engine):
    """Observes the running kernel.

    Args:
        open_capture: loads and attaches everything; is given what to ask whether to end. May take
            seconds, and is called in a thread.
        read_early: one counter sample, for the time until then.
        read_savings: what the page tables say; may take seconds, called in a thread.
        most_waiting: so many events may wait to be folded.
    """

    is_live = True

    def __init__(
        self,
        open_capture: Callable[[Callable[[], str | None]], Capturing],
        read_early: Callable[[], CounterSample] | None = None,
        read_savings: Callable[[], PageSavings] | None = None,
        most_waiting: int = MOST_WAITING_EVENTS,
    ) -> None:
        super().__init__()
        self._open_capture = open_capture
        self._read_early = read_early
        self._read_savings = read_savings
        self._most_waiting = most_waiting
        self._waiting: deque[Item | npt.NDArray[np.int64]] = deque()
        self._nr_waiting = 0
        self._lock = threading.Lock()
        self._come = threading.Event()
        self._capture_ended = threading.Event()
        self._header: Header | None = None
        self._backlog: Backlog | None = None
        self._excerpt: Excerpt | None = None
        self._recording = threading.Lock()
        self._wanted: Path | None = None
        self._to_end = False
        self._frozen = False
        self._reading_savings = False

    def start(self) -> None:
        """Begin: with what sysfs tells, then the capture."""
        if self._read_early is not None:
            with contextlib.suppress(KsmtraceError):
                self._publish(early=self._read_early())
        self._publish(says="loading and attaching the programs")
        self._run(self._drain, self._fold)

    # ---- asked by the screen ----

    def freeze(self) -> None:
        """Hold the picture, or let it go on; events are taken in meanwhile."""
        if self._capture_ended.is_set():
            return
        self._frozen = not self._frozen
        self._publish(phase=Phase.PAUSED if self._frozen else Phase.LIVE)
        self._come.set()

    def record(self, path: Path) -> None:
        """Begin a recording with what is remembered; the next moments tell what came of it."""
        if self._excerpt is None:
            self._wanted = path

    def end_recording(self) -> None:
        """End the recording that is under way."""
        self._to_end = True

    def ask_savings(self) -> None:
        """Have the page tables read, in a thread."""
        if self._read_savings is not None and not self._reading_savings:
            self._reading_savings = True
            self._run(self._take_savings)

    def _take_savings(self) -> None:
        assert self._read_savings is not None
        try:
            self._publish(savings=self._read_savings())
        except KsmtraceError as error:
            self._publish(savings=PageSavings(time.monotonic_ns(), why_not=str(error)))
        finally:
            self._reading_savings = False

    def _to_judge(self) -> tuple[Path | Remembered | None, str]:
        backlog = self._backlog
        with self._recording:
            stream = backlog.stream() if backlog is not None else None
        if stream is None:
            return None, "nothing is remembered yet to be judged"
        length_s = (time.monotonic_ns() - stream.header.started_ns) / 1e9
        return stream, f"the last {length_s:.0f} s"

    # ---- the thread that drains ----

    def _until(self) -> str | None:
        return "quit" if self._stopping.is_set() else None

    def _drain(self) -> None:
        from ksmtrace.recording.excerpt import Backlog

        capture: Capturing | None = None
        try:
            capture = self._open_capture(self._until)
            self._header = capture.header
            self._backlog = Backlog(capture.header)
            self._publish(phase=Phase.LIVE, says="taking in the first events")
            for item in capture:
                self._record_item(item)
                self._hand_over(item)
            self.failure = capture.progress.failure
        except KsmtraceError as error:
            self.failure = error
        finally:
            self._end_excerpt("the capture ended")
            if capture is not None:
                capture.close()
            self._capture_ended.set()
            self._come.set()
        if self._header is None and self.failure is not None:
            self._publish(phase=Phase.FAILED, says=str(self.failure))

    def _hand_over(self, item: Item) -> None:
        from ksmtrace.stream import Batch

        with self._lock:
            if not isinstance(item, Batch):
                self._waiting.append(item)
            elif self._nr_waiting + len(item.events) <= self._most_waiting:
                self._waiting.append(item)
                self._nr_waiting += len(item.events)
            else:
                self._leave_out(item)
        self._come.set()

    def _leave_out(self, batch: Batch) -> None:
        import numpy as np

        from ksmtrace.events import NR_KINDS

        counts = np.bincount(batch.events["kind"], minlength=NR_KINDS)
        last = self._waiting[-1] if self._waiting else None
        if isinstance(last, np.ndarray):
            counts += last
            self._waiting.pop()
        self._waiting.append(counts)

    def _record_item(self, item: Item) -> None:
        backlog = self._backlog
        assert backlog is not None
        with self._recording:
            backlog.take(item)
            if self._excerpt is not None:
                self._write(item)
            elif self._wanted is not None and backlog.begin_ns is not None:
                self._begin_excerpt(self._wanted)
                self._wanted = None
            if self._to_end:
                self._to_end = False
                self._end_excerpt("ended by the user")

    def _begin_excerpt(self, path: Path) -> None:
        assert self._backlog is not None
        try:
            self._excerpt = self._backlog.record(path)
        except KsmtraceError as error:
            self._publish(recorder=Recorder(path, 0, 0, f"not recorded: {error}"))
            return
        if self._excerpt is not None and self._excerpt.ended:
            self._tell_recorder("recorded")
            self._excerpt = None
        elif self._excerpt is not None:
            self._tell_recorder("")

    def _write(self, item: Item) -> None:
        assert self._excerpt is not None
        try:
            self._excerpt.write(item)
        except KsmtraceError as error:
            self._tell_recorder(f"recording ended: {error}")
            self._excerpt.abandon()
            self._excerpt = None
            return
        if self._excerpt.ended:
            self._tell_recorder("recorded")
            self._excerpt = None

    def _end_excerpt(self, reason: str) -> None:
        excerpt, self._excerpt = self._excerpt, None
        if self._wanted is not None:
            says = "not recorded: there was no sample of the counters to begin with"
            self._publish(recorder=Recorder(self._wanted, 0, 0, says))
        if excerpt is None:
            return
        try:
            excerpt.end(reason, time.monotonic_ns())
            says = "recorded"
        except KsmtraceError as error:
            excerpt.abandon()
            says = f"recording ended: {error}"
        self._publish(
            recorder=Recorder(excerpt.path, excerpt.nr_events, excerpt.written_bytes, says)
        )

    def _tell_recorder(self, says: str) -> None:
        excerpt = self._excerpt
        assert excerpt is not None
        self._publish(
            recorder=Recorder(excerpt.path, excerpt.nr_events, excerpt.written_bytes, says)
        )

    # ---- the thread that folds ----

    def _fold(self) -> None:
        # While the programs are loaded, which leaves it the time.
        from ksmtrace.analysis.live import Live

        live: Live | None = None
        next_s = 0.0
        while True:
            self._come.wait(PICTURE_S)
            self._come.clear()
            ended = self._capture_ended.is_set()
            if live is None and self._header is not None:
                live = Live(self._header)
            taken = True
            while live is not None and taken:
                taken = self._take_some(live)
                live.settle()
                if time.monotonic() >= next_s:
                    next_s = self._draw(live, ended and not taken)
            if ended:
                if live is not None:
                    self._draw(live, True)
                return
            # Batches come every few milliseconds: together they are folded in less time.
            self._stopping.wait(_IDLE_S)

    def _take_some(self, live: Live) -> bool:
        import numpy as np

        from ksmtrace.stream import Batch

        taken = 0
        while taken < _TAKE_EVENTS:
            with self._lock:
                if not self._waiting:
                    return False
                item = self._waiting.popleft()
                if isinstance(item, Batch):
                    self._nr_waiting -= len(item.events)
            if isinstance(item, np.ndarray):
                live.skip(item)
            else:
                live.take(item)
                taken += len(item.events) if isinstance(item, Batch) else 0
        return True

    def _draw(self, live: Live, whole: bool) -> float:
        begun_s = time.monotonic()
        changes: dict[str, Any] = {"waiting": self._nr_waiting}
        if not self._frozen or whole:
            at_ns = None if whole else time.monotonic_ns()
            changes |= {"picture": live.picture(at_ns, all_of_it=whole), "says": ""}
        if self._backlog is not None:
            changes["can_record"] = self._backlog.begin_ns
        if whole:
            changes |= self._ending()
        with self._recording:
            if self._excerpt is not None and not whole:
                changes["recorder"] = Recorder(
                    self._excerpt.path, self._excerpt.nr_events, self._excerpt.written_bytes
                )
        self._publish(**changes)
        return begun_s + max(PICTURE_S, 2 * (time.monotonic() - begun_s))

    def _ending(self) -> dict[str, Any]:
        if self.failure is None:
            return {"phase": Phase.ENDED, "says": "the capture has ended"}
        hint = f" ({self.failure.hint})" if self.failure.hint else ""
        return {"phase": Phase.FAILED, "says": f"{self.failure}{hint}"}
