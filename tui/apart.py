"""An engine in a process of its own, so that drawing and folding never wait for each other.

Moments come over a socket as :mod:`ksmtrace.tui.wire` writes them; what the screen asks for goes
the other way, a line each. When either end goes away, the other one sees the end of the socket:
the engine then ends in order, the screen says why.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

from ksmtrace.errors import CannotRun

from .engine import Engine
from .moment import Judged, Phase

_COLLECT_AFTER = 50_000  # objects
_SWITCH_S = 0.001
_MOST_ERROR_BYTES = 1 << 16
_COMMANDS = frozenset(
    (
        *("start", "stop", "ask_claims", "freeze", "record", "end_recording", "ask_savings"),
        *("step", "faster", "seek", "seek_by"),
    )
)


class EngineApart(Engine):
    """Runs an engine in a process of its own.

    Forks at once: nothing may run in another thread of this process by then.

    Args:
        engine: that runs there; not started yet.

    Attributes:
        pid: of that process.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.is_live = engine.is_live
        self.shown = engine.shown
        self._errors = os.memfd_create("errors", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            ours.close()
            _run(engine, theirs, self._errors)
        theirs.close()
        self._socket = ours
        self._status: int | None = None
        self._asking = threading.Lock()
        self._reaping = threading.Lock()

    def start(self) -> None:
        """Begin."""
        # A moment is thousands of objects: a key must not wait until all are looked at for cycles,
        # nor the thread that draws for the one that receives.
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)
        sys.setswitchinterval(_SWITCH_S)
        self._run(self._receive)
        self._ask("start")

    def stop(self) -> None:
        """End."""
        super().stop()
        self._ask("stop")

    def join(self, timeout_s: float = 10.0) -> bool:
        """Wait until the process has ended; one that does not is killed, and False returned."""
        deadline_s = time.monotonic() + timeout_s
        while not self._has_ended() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        in_order = self._has_ended()
        if not in_order:
            os.kill(self.pid, signal.SIGKILL)
            self._has_ended(0)
        for thread in self._threads:
            thread.join()
        self._socket.close()
        return in_order

    def _has_ended(self, how: int = os.WNOHANG) -> bool:
        with self._reaping:
            if self._status is None:
                pid, status = os.waitpid(self.pid, how)
                if pid:
                    self._status = status
            return self._status is not None

    # ---- asked by the screen ----

    def ask_claims(self) -> None:
        """Have the claims judged."""
        self._ask("ask_claims")

    def freeze(self) -> None:
        """Hold the picture, or let it go on."""
        self._ask("freeze")

    def record(self, path: Path) -> None:
        """Begin a recording."""
        self._ask("record", str(path))

    def end_recording(self) -> None:
        """End the recording that is under way."""
        self._ask("end_recording")

    def ask_savings(self) -> None:
        """Have the page tables read."""
        self._ask("ask_savings")

    def step(self) -> None:
        """Go a step on."""
        self._ask("step")

    def faster(self, by: int) -> None:
        """Take a higher or lower speed."""
        self._ask("faster", by)

    def seek(self, share: float) -> None:
        """Go to a share of the recording."""
        self._ask("seek", share)

    def seek_by(self, share: float) -> None:
        """Go by a share of the recording."""
        self._ask("seek_by", share)

    def _ask(self, command: str, *arguments: object) -> None:
        # One that has gone is told of by the thread that receives.
        with self._asking, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps([command, *arguments]).encode() + b"\n")

    # ---- the thread that receives ----

    def _receive(self) -> None:
        from .wire import Receiver

        receiver = Receiver(self._socket)
        while (moment := receiver.receive()) is not None:
            shown, self.failure, crash = moment
            if crash:
                self.crashed = RuntimeError(crash)
            self.shown = shown
        if not self._stopping.is_set() and self.shown.phase not in (Phase.ENDED, Phase.FAILED):
            self._tell_of_its_end()

    def _tell_of_its_end(self) -> None:
        content = os.pread(self._errors, _MOST_ERROR_BYTES, 0).decode(errors="replace")
        self._has_ended(0)
        assert self._status is not None
        signum = os.WTERMSIG(self._status) if os.WIFSIGNALED(self._status) else 0
        how = f"by {signal.Signals(signum).name}" if signum else "by itself"
        last = content.strip().splitlines()[-1:]
        error = CannotRun(
            f"the process that takes in the events was ended {how}", last[0] if last else None
        )
        self.failure = error
        changes: dict[str, object] = {"phase": Phase.FAILED, "says": str(error)}
        if self.shown.judged is None:
            changes["judged"] = Judged(why_not=f"not judged: {error}")
        if self.shown.recorder is not None and not self.shown.recorder.says:
            changes["recorder"] = replace(self.shown.recorder, says=f"recording cut off: {error}")
        self._publish(**changes)


# ---- the process that runs the engine ----


def _run(engine: Engine, to_screen: socket.socket, errors: int) -> None:
    try:
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            # A terminal sends these to the whole group: the screen decides.
            signal.signal(signum, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, to in ((0, nothing), (1, nothing), (2, errors)):
            os.dup2(to, number)
        commands = threading.Thread(target=_obey, args=(engine, to_screen), daemon=True)
        commands.start()
        _send_moments(engine, to_screen)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)


def _obey(engine: Engine, to_screen: socket.socket) -> None:
    with to_screen.makefile("rb") as lines, contextlib.suppress(OSError):
        for line in lines:
            command, *arguments = json.loads(line)
            if command == "record":
                arguments = [Path(arguments[0])]
            if command in _COMMANDS:
                getattr(engine, command)(*arguments)
    engine.stop()


def _send_moments(engine: Engine, to_screen: socket.socket) -> None:
    from .wire import Sender

    sender = Sender(to_screen)
    ended = False
    while not ended:
        engine.published.wait(None if not engine.stopping else 0.05)
        engine.published.clear()
        ended = engine.stopping and engine.join(0)
        crash = "" if engine.crashed is None else _told(engine.crashed)
        try:
            sender.send((engine.shown, engine.failure, crash))
        except OSError:
            # The screen has gone.
            engine.stop()
            engine.join()
            return


def _told(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
