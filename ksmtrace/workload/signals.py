"""Turns SIGINT, SIGTERM and SIGHUP into a flag that is looked at where stopping is safe.

An exception raised by a signal handler could land between saving a knob and being ready to
restore it; a flag cannot.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from types import FrameType

from ksmtrace.errors import KsmtraceError

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KsmtraceError):
    """A signal asked the command to stop; the exit status is 128 and the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_status = 128 + signum


class Stop:
    """Whether a signal asked to stop, and the pauses that it ends early."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def request(self, signum: int, frame: FrameType | None = None) -> None:
        """Ask to stop; this is the signal handler."""
        if self._signum is None:
            self._signum = signum
            os.write(self._wake, b"s")

    def check(self) -> None:
        """Raise :class:`Interrupted` once a signal has come."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def pause(self, seconds: float) -> None:
        """Pass the time, unless a signal comes or has come."""
        self.wait_readable(None, seconds)

    def wait_readable(self, fd: int | None, seconds: float) -> bool:
        """Wait until ``fd`` can be read; False when the time was up first.

        Raises:
            Interrupted: a signal came.
        """
        fds = [self._woken] if fd is None else [self._woken, fd]
        ready, _, _ = select.select(fds, [], [], max(0.0, seconds))
        self.check()
        return fd in ready

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._woken)
        os.close(self._wake)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Catch the signals that ask a command to end, for as long as the block lasts."""
    stop = Stop()
    before = {signum: signal.signal(signum, stop.request) for signum in CAUGHT}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        stop.close()
