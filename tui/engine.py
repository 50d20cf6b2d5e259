"""What runs behind the screen: takes in a stream in threads of its own and publishes moments.

The screen's thread only reads :attr:`Engine.shown`, which is replaced as a whole and never
changes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksmtrace.errors import KsmtraceError

from .moment import Judged, Phase, Shown

if TYPE_CHECKING:
    from ksmtrace.recording.excerpt import Remembered

    from .judge import Judge

PICTURE_S = 0.25


class Engine:
    """What all engines have in common: a moment that is published, and an end.

    Attributes:
        shown: the last moment; replaced as a whole.
        failure: the error that ended it, None while there is none.
        crashed: a fault of ours that ended it, None while there is none.
        published: set when there is a new moment.
        is_live: whether it observes the running kernel.
    """

    is_live = False

    def __init__(self) -> None:
        self.shown = Shown()
        self.failure: KsmtraceError | None = None
        self.crashed: Exception | None = None
        self.published = threading.Event()
        self._stopping = threading.Event()
        self._publishing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._judging = False
        self._judge_apart: Judge | None = None

    def start(self) -> None:
        """Begin; returns at once."""

    def stop(self) -> None:
        """End; may be called more than once and from any thread."""
        self._stopping.set()
        self.published.set()
        if self._judge_apart is not None:
            self._judge_apart.close()

    @property
    def stopping(self) -> bool:
        """Whether it was told to end."""
        return self._stopping.is_set()

    def join(self, timeout_s: float = 10.0) -> bool:
        """Wait until everything has ended; returns whether it has."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def ask_claims(self) -> None:
        """Have the claims judged, in a thread; the next moments tell what came of it."""
        if not self._judging:
            self._judging = True
            self._run(self._judge)

    def freeze(self) -> None:
        """Hold the picture, or let it go on; a replay pauses, or plays on."""

    def record(self, path: Path) -> None:
        """Begin a recording with what is remembered; the next moments tell what came of it."""

    def end_recording(self) -> None:
        """End the recording that is under way."""

    def ask_savings(self) -> None:
        """Have the page tables read; the next moments tell what they say."""

    def step(self) -> None:
        """Go a quarter of a second on in a replay, paused."""

    def faster(self, by: int) -> None:
        """Replay at a higher speed, or with -1 at a lower one."""

    def seek(self, share: float) -> None:
        """Go to a share of the recording, 0 to 1."""

    def seek_by(self, share: float) -> None:
        """Go by a share of the recording, back with a negative one."""

    def _judge(self) -> None:
        from .judge import Judge

        judge = self._judge_apart = self._judge_apart or Judge()
        try:
            on, of = self._to_judge()
            if not self._stopping.is_set():
                judged = Judged(why_not=of) if on is None else judge.judge(on, of)
                self._publish(judged=judged)
        except Exception as error:  # a fault of ours, for which no capture is to end
            why_not = f"not judged, by a fault in ksmtrace: {error!r}"
            self._publish(judged=Judged(why_not=why_not))
        finally:
            self._judging = False
            if not self.is_live:
                # Nobody asks a second time.
                self._judge_apart = None
                judge.close()

    def _to_judge(self) -> tuple[Path | Remembered | None, str]:
        # What claims can be judged on now, and what that is; or None, and why.
        raise NotImplementedError

    def _run(self, *targets: Callable[[], None]) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for target in targets:
            thread = threading.Thread(target=self._guarded, args=(target,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:  # a fault of ours: the screen must not just stand still
            self.crashed = error
            self._publish(phase=Phase.FAILED, says=f"a fault in ksmtrace: {error!r}")
            self.stop()

    def _publish(self, **changes: Any) -> None:
        with self._publishing:
            self.shown = replace(self.shown, number=self.shown.number + 1, **changes)
        self.published.set()
