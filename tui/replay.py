"""The engine of a replay: a recording at a chosen pace, and at any of its moments."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksmtrace.errors import KsmtraceError

from .engine import PICTURE_S, Engine
from .moment import Phase, Position

if TYPE_CHECKING:
    from ksmtrace.analysis.live import Live
    from ksmtrace.recording.excerpt import Remembered
    from ksmtrace.stream import Batch, Item

_MOST_JUDGED_EVENTS = 5_000_000
_STEP_NS = 250_000_000
CHECKPOINT_EVENTS = 1 << 19
"""At most so many events are folded again when one seeks back, in a recording that is not long."""

MOST_CHECKPOINTS = 8
"""Each holds all that is known at its time. With more, every other one is given up."""

SPEEDS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class ReplayEngine(Engine):
    """Replays a recording at a chosen pace.

    Args:
        path: the recording.
        at_end: begin at its end, paused; else play from its beginning.
        now_s: a clock.

    Raises:
        RecordingError: it is no readable recording.
    """

    def __init__(
        self, path: Path, at_end: bool = False, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        from ksmtrace.recording.reader import RecordingReader

        self._path = path
        self._now_s = now_s
        self._reader = RecordingReader(path)
        self._commands: deque[tuple[str, float]] = deque()
        self._asked = threading.Event()
        self._speed = 1.0
        self._paused = at_end
        self._length_ns = 0
        self._at_ns = 0
        self._target_ns: int | None = None
        self._cut_off = ""
        self._checkpoints: list[_Checkpoint] = []
        self._spacing = CHECKPOINT_EVENTS
        if at_end:
            self._commands.append(("seek", 1.0))

    def start(self) -> None:
        """Begin: finds out how long it is, then plays."""
        self._publish(says=f"reading {self._path}")
        self._run(self._play)

    def stop(self) -> None:
        """End."""
        super().stop()
        self._asked.set()

    # ---- asked by the screen ----

    def freeze(self) -> None:
        """Pause, or play on."""
        self._ask("freeze", 0)

    def step(self) -> None:
        """Go a quarter of a second on, paused."""
        self._ask("step", 0)

    def faster(self, by: int) -> None:
        """Take a higher speed of :data:`SPEEDS`, or with -1 a lower one."""
        self._ask("speed", by)

    def seek(self, share: float) -> None:
        """Go to a share of the recording, 0 to 1."""
        self._ask("seek", share)

    def seek_by(self, share: float) -> None:
        """Go by a share of the recording, back with a negative one."""
        self._ask("seek_by", share)

    def _ask(self, command: str, by: float) -> None:
        self._commands.append((command, by))
        self._asked.set()

    def _to_judge(self) -> tuple[Path | Remembered | None, str]:
        picture = self.shown.picture
        if picture is not None and picture.nr_events > _MOST_JUDGED_EVENTS:
            return None, f"it is long: ksmtrace check {self._path} judges it"
        return self._path, "the whole recording"

    # ---- the thread that plays ----

    def _play(self) -> None:
        from ksmtrace.analysis.live import Live

        player: _Player | None = None
        try:
            self._measure()
            player = _Player(self._path, _Checkpoint(0, 0, 0, Live(self._reader.header)))
            last_s = self._now_s()
            while not self._stopping.is_set():
                player = self._obey(player)
                now_s = self._now_s()
                ended = self._at_ns >= self._length_ns
                if not self._paused and not ended:
                    self._at_ns += round((now_s - last_s) * self._speed * 1e9)
                    self._at_ns = min(self._at_ns, self._length_ns)
                last_s = now_s
                self._advance(player)
                if self._stopping.is_set():
                    return
                if not self._commands:
                    still = self._paused or self._at_ns >= self._length_ns
                    self._asked.wait(None if still else PICTURE_S)
                    if still:
                        last_s = self._now_s()
                self._asked.clear()
        except KsmtraceError as error:
            self._tell_failure(player, error)

    def _tell_failure(self, player: _Player | None, error: KsmtraceError) -> None:
        # What came before it can still be gone to.
        self.failure = error
        hint = f" ({error.hint})" if error.hint else ""
        changes: dict[str, Any] = {"phase": Phase.FAILED, "says": f"{error}{hint}"}
        if player is not None:
            changes["picture"] = player.live.picture(all_of_it=True)
            changes["position"] = Position(self._length_ns, self._length_ns, self._speed)
        self._publish(**changes)

    def _measure(self) -> None:
        from ksmtrace.recording.reader import RecordingReader
        from ksmtrace.stream import time_of

        self._measured_bytes = self._path.stat().st_size
        reader = self._reader = RecordingReader(self._path)
        end_ns = reader.header.started_ns
        for item in reader:
            if self._stopping.is_set():
                return
            end_ns = max(end_ns, time_of(item))
        self._cut_off = reader.cut_off or ""
        self._length_ns = end_ns - reader.header.started_ns

    def _has_grown(self) -> bool:
        with contextlib.suppress(OSError):
            return self._path.stat().st_size > self._measured_bytes
        return False

    def _obey(self, player: _Player) -> _Player:
        if self._commands and self._has_grown():
            # It is still being recorded.
            self._measure()
            player = self._back_to(min(player.at_ns, self._at_ns + self._reader.header.started_ns))
        while self._commands:
            command, by = self._commands.popleft()
            if command == "freeze" and self._at_ns >= self._length_ns:
                self._paused, self._at_ns = False, 0
            elif command == "freeze":
                self._paused = not self._paused
            elif command == "step":
                self._paused = True
                self._at_ns = min(self._at_ns + _STEP_NS, self._length_ns)
            elif command == "speed":
                at = SPEEDS.index(self._speed) + int(by)
                self._speed = SPEEDS[min(max(at, 0), len(SPEEDS) - 1)]
            else:
                target = by if command == "seek" else self._at_ns / max(self._length_ns, 1) + by
                self._at_ns = round(min(max(target, 0.0), 1.0) * self._length_ns)
        target_ns = self._at_ns + self._reader.header.started_ns
        return self._back_to(target_ns) if player.at_ns > target_ns else player

    def _back_to(self, target_ns: int) -> _Player:
        # Nothing of a fold can be taken back: it goes on from what it was before.
        from ksmtrace.analysis.live import Live

        before = _Checkpoint(0, 0, 0, Live(self._reader.header))
        for checkpoint in self._checkpoints:
            if checkpoint.at_ns <= target_ns:
                before = checkpoint
        return _Player(self._path, before)

    def _keep(self, player: _Player) -> None:
        last = self._checkpoints[-1].nr_events if self._checkpoints else 0
        if player.nr_events - last < self._spacing:
            return
        checkpoint = player.checkpoint()
        if checkpoint is None:
            return
        self._checkpoints.append(checkpoint)
        if len(self._checkpoints) > MOST_CHECKPOINTS:
            self._checkpoints = self._checkpoints[1::2]
            self._spacing *= 2

    def _advance(self, player: _Player) -> None:
        target_ns = self._reader.header.started_ns + self._at_ns
        whole = self._at_ns >= self._length_ns
        next_s = time.monotonic() + PICTURE_S
        for _ in player.go_to(target_ns, whole):
            self._keep(player)
            if self._stopping.is_set() or self._commands:
                return
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + PICTURE_S
                self._tell(player, Phase.SEEKING, False)
        phase = Phase.ENDED if whole else Phase.PAUSED if self._paused else Phase.PLAYING
        self._tell(player, phase, self._paused or whole)

    def _tell(self, player: _Player, phase: Phase, whole: bool) -> None:
        started_ns = self._reader.header.started_ns
        if phase is Phase.SEEKING:
            at_ns = player.at_ns - started_ns
            position = Position(at_ns, self._length_ns, self._speed, self._cut_off)
            self._publish(phase=phase, says="", position=position)
            return
        says = ""
        if phase is Phase.ENDED and self._cut_off:
            says = f"the recording {self._cut_off.removeprefix('it ')}"
        self._publish(
            phase=phase,
            says=says,
            picture=player.live.picture(started_ns + self._at_ns, all_of_it=whole),
            position=Position(self._at_ns, self._length_ns, self._speed, self._cut_off),
        )


@dataclass(frozen=True)
class _Checkpoint:
    nr_items: int  # of the recording, that were taken in
    nr_events: int
    at_ns: int  # nothing in it is of a later time
    live: Live


class _Player:
    # A recording that has been taken in up to a time.

    def __init__(self, path: Path, begin: _Checkpoint) -> None:
        from ksmtrace.recording.reader import RecordingReader

        self.live = begin.live.copy()
        self.at_ns = begin.at_ns or begin.live.header.started_ns
        self.nr_events = begin.nr_events
        self._nr_items = begin.nr_items
        self._items = islice(iter(RecordingReader(path)), begin.nr_items, None)
        self._next: Item | None = None
        self._later: deque[Item] = deque()
        self._known_ns = begin.at_ns

    def checkpoint(self) -> _Checkpoint | None:
        # None in the middle of what comes together.
        if self._next is not None or self._later:
            return None
        at_ns = max(self._known_ns, self.live.at_ns)
        return _Checkpoint(self._nr_items, self.nr_events, at_ns, self.live.copy())

    def go_to(self, target_ns: int, whole: bool) -> Iterator[None]:
        # Takes in what was known until then, and yields now and then.
        from ksmtrace.stream import Batch, CounterSample, ProcessSeen, time_of

        while self._later and (whole or time_of(self._later[0]) <= target_ns):
            self.live.take(self._later.popleft())
        while (item := self._peek()) is not None:
            if isinstance(item, Batch) and len(item.events):
                if not self._take_part(item, None if whole else target_ns):
                    break
            elif whole or isinstance(item, ProcessSeen) or time_of(item) <= target_ns:
                self.live.take(item)
                self._next = None
            elif isinstance(item, CounterSample) and self._later:
                break
            else:
                # The events up to its time come after it in the stream.
                self._later.append(item)
                self._next = None
            self.at_ns = max(self.at_ns, min(self.live.at_ns, target_ns))
            yield
        self.at_ns = max(self.at_ns, target_ns)

    def _take_part(self, batch: Batch, until_ns: int | None) -> bool:
        # Returns whether all of it was taken.
        import numpy as np

        from ksmtrace.reconstruct.replay import told_ns
        from ksmtrace.stream import Batch

        known = told_ns(batch.events, self._known_ns)
        until = len(known)
        if until_ns is not None:
            until = int(np.searchsorted(known, np.uint64(until_ns), side="right"))
        if until:
            self.live.take(Batch(batch.events[:until]))
            self._known_ns = int(known[until - 1])
            self.nr_events += until
        self._next = Batch(batch.events[until:]) if until < len(batch.events) else None
        return self._next is None

    def _peek(self) -> Item | None:
        if self._next is None:
            self._next = next(self._items, None)
            self._nr_items += 1
        return self._next
