"""Judges claims in a program of its own: of lowest priority, so that it delays no moment.

In a thread beside the one that folds, each of the thousands of small steps of a judgement would
keep that one from running for a while; on a busy machine the screen stood still for minutes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksmtrace.errors import KsmtraceError

from .moment import Judged
from .wire import Receiver, Sender

if TYPE_CHECKING:
    from ksmtrace.recording.excerpt import Remembered
    from ksmtrace.stream import Stream

_LEAST_PRIORITY = 19
# The directory that top was started in is nothing to import from.
_PROGRAM = [sys.executable, "-P", "-m", "ksmtrace.tui.judge"]


class Judge:
    """Has claims judged, one case after the other; starts the program for the first one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._closed = False

    def judge(self, on: Path | Remembered, of: str) -> Judged:
        """Judge all claims; may take long.

        Args:
            on: a recording, or a part of a stream.
            of: what that is, in words.
        """
        begun_s = time.monotonic()
        try:
            sender, receiver = self._started()
            sender.send(str(on) if isinstance(on, Path) else (on.header, on.items))
            judged = receiver.receive()
        except OSError:
            judged = None
        if judged is None:
            self._end()
            return Judged(why_not="not judged: the program that judges was ended")
        judgements, why_not = judged
        return Judged(judgements, of, why_not, time.monotonic() - begun_s)

    def close(self) -> None:
        """End the program; a judgement under way comes to nothing."""
        self._closed = True
        self._end()

    def _started(self) -> tuple[Sender, Receiver]:
        with self._starting:
            if self._closed:
                raise ConnectionError
            if self._process is None:
                self._socket, theirs = socket.socketpair()
                with theirs:
                    # In this session: the scheduler would give one of its own a share of its own.
                    self._process = subprocess.Popen(
                        _PROGRAM,
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                self._ends = Sender(self._socket), Receiver(self._socket)
            return self._ends

    def _end(self) -> None:
        with self._starting:
            process, self._process = self._process, None
            if process is not None:
                # Not closed: another thread may be reading.
                self._socket.shutdown(socket.SHUT_RDWR)
                process.kill()
                process.wait()


def main() -> None:
    """Judge what comes in, until nothing can come any more."""
    os.nice(_LEAST_PRIORITY)
    for signum in (signal.SIGINT, signal.SIGHUP):
        # A terminal sends these to the whole group: the screen decides.
        signal.signal(signum, signal.SIG_IGN)
    asked = socket.socket(fileno=os.dup(0))
    sender, receiver = Sender(asked), Receiver(asked)
    while (told := receiver.receive()) is not None:
        sender.send(_judge(told))


def _judge(told: Any) -> tuple[tuple[Any, ...], str]:
    # Judgements, or why there are none.
    from ksmtrace.analysis.recorded import gather
    from ksmtrace.claims.claim import Case
    from ksmtrace.claims.judgement import judge_all
    from ksmtrace.claims.table import CLAIMS
    from ksmtrace.recording.excerpt import Remembered
    from ksmtrace.recording.reader import RecordingReader

    try:
        stream: Stream = RecordingReader(Path(told)) if isinstance(told, str) else Remembered(*told)
        return tuple(judge_all(CLAIMS, Case(gather(stream)))), ""
    except KsmtraceError as error:
        return (), str(error)
    except Exception as error:  # a fault of ours, for which no capture is to end
        return (), f"not judged, by a fault in ksmtrace: {error!r}"


if __name__ == "__main__":
    main()
