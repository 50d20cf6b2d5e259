"""Runs one command in one guest, and tells how that ended."""

from __future__ import annotations

import contextlib
import enum
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Literal, Self

from ksmtrace.errors import BackendUnavailable, CannotRun, LostVM, UsageError
from ksmtrace.vm import machine
from ksmtrace.vm.cache import Notify
from ksmtrace.vm.console import clean_console, find_death, tail
from ksmtrace.vm.kernels import Kernel
from ksmtrace.vm.machine import Accelerator, Ports, VmOptions

# Until the guest's init reports. Measured here under emulation: 5 to 8 s on an idle machine.
BOOT_BOUND_S = {"tcg": 240.0, "kvm": 15.0}
# The guest reports every 5 s, unless it is gone.
SILENCE_BOUND_S = 120.0
# How long the command may take to end once it was told to.
GRACE_S = 30.0
# How long QEMU may take to end, or its output to arrive, once the guest is done.
_END_BOUND_S = 30.0
_TICK_S = 0.25
_GUESTS_TAKE = (
    "a guest's kernel takes PCI, VIRTIO_PCI, VIRTIO_CONSOLE, NET_9P_VIRTIO, 9P_FS, OVERLAY_FS, "
    "TMPFS, DEVTMPFS and BLK_DEV_INITRD, built in or as modules (make modules_install "
    "INSTALL_MOD_PATH=. in its tree)"
)
_KVM_IS_DEAD = f"no sign of life with KVM in {BOOT_BOUND_S['kvm']:.0f} s"
_LACKS = "lacks "
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Outcome(enum.Enum):
    """How a command in a guest ended. A guest that is lost is a LostVM instead."""

    EXITED = "exited"
    TIMED_OUT = "timed out"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class VmResult:
    """What a command in a guest did.

    Attributes:
        outcome: how it ended.
        command_status: the command's own exit status, 128 + N after signal N; None where it did
            not end within the grace period of a time-out or interruption.
        exit_status: what a program that stands for the command ends with: the command's own,
            124 after a time-out, 128 + N when interrupted by signal N. 255 means a lost guest
            and nothing else, so a command's own 255 is 254 here.
        stdout: what the command wrote, None where it was passed on.
        stderr: the same.
        console: what the guest's kernel wrote.
        accelerator: ``kvm`` or ``tcg`` (emulation).
        boot_s: from the start of QEMU until the guest's init reported.
        command_s: from then on until the command ended.
    """

    outcome: Outcome
    command_status: int | None
    exit_status: int
    stdout: bytes | None
    stderr: bytes | None
    console: str
    accelerator: Accelerator
    boot_s: float
    command_s: float


def run_in_vm(
    command: Sequence[str],
    kernel: Kernel,
    options: VmOptions | None = None,
    *,
    timeout_s: float | None = None,
    capture: bool = False,
    environment: Mapping[str, str] | None = None,
    working_directory: Path | None = None,
    pass_signals: bool = False,
    notify: Notify = lambda text: None,
) -> VmResult:
    """Run a command in a throw-away guest, as root, over this machine's file system.

    Args:
        command: its words, none of which is interpreted.
        kernel: what to boot.
        options: what the guest consists of.
        timeout_s: how long the command may run; the boot does not count.
        capture: whether to return the output, instead of passing it to this process's.
        environment: of the command; this process's if None.
        working_directory: of the command; this process's if None.
        pass_signals: whether SIGINT, SIGTERM and SIGHUP go to the command (main thread only);
            a second one ends the guest at once.
        notify: is told what takes time or is done another way than asked for.

    Raises:
        CannotRun: QEMU does not start the guest, or it cannot be given all that was asked for.
        LostVM: the guest panicked, oopsed, hung, did not boot, or ended by itself.
    """
    options = options or VmOptions()
    options = replace(options, writable=machine.check_writable(options.writable))
    if not command:
        raise UsageError("no command to run in the guest")
    machine.qemu_program()
    directory = (working_directory or Path.cwd()).resolve()
    with tempfile.TemporaryDirectory(prefix="ksmtrace-vm-", dir="/tmp") as name:
        run = Path(name)
        marker = f"<ksmtrace-{secrets.token_hex(16)}>"
        machine.write_run_directory(
            run,
            command,
            os.environ if environment is None else environment,
            directory,
            marker,
            kernel,
            options,
        )
        machine.make_initramfs(kernel, run / "initramfs")
        with _signals(pass_signals) as signals:
            for accelerator in _accelerators(options):
                out = _Output(marker.encode(), None if capture else sys.stdout.buffer)
                err = _Output(marker.encode(), None if capture else sys.stderr.buffer)
                with _Guest(run, kernel, options, accelerator) as guest:
                    boot = _await_boot(guest, signals)
                    if boot == "silent" and accelerator == "kvm":
                        if options.accelerator is None:
                            machine.remember_kvm(False, notify)
                            notify(f"{_KVM_IS_DEAD}: emulating instead, until this machine reboots")
                            continue
                        raise _lost(guest, _KVM_IS_DEAD, False)
                    if boot == "silent":
                        bound_s = BOOT_BOUND_S["tcg"]
                        raise _lost(guest, f"no sign of life in {bound_s:.0f} s", False)
                    if boot == "up" and accelerator == "kvm":
                        machine.remember_kvm(True, notify)
                    return _Run(guest, out, err, signals, timeout_s).follow(boot == "up")
    raise AssertionError("the last accelerator returns or raises")


def _accelerators(options: VmOptions) -> tuple[Accelerator, ...]:
    if options.accelerator is not None:
        return (options.accelerator,)
    usable = machine.kvm_state()
    if usable is None:
        return ("kvm", "tcg")
    return ("kvm",) if usable else ("tcg",)


class _Guest:
    """A running QEMU, and the host's ends of its ports."""

    def __init__(
        self, run: Path, kernel: Kernel, options: VmOptions, accelerator: Accelerator
    ) -> None:
        self.accelerator = accelerator
        self.boot_s = 0.0
        self.started_s = time.monotonic()
        self._console = run / "console"
        self._console.write_bytes(b"")
        self._log = run / "qemu.log"
        self._lines = b""
        pairs = [socket.socketpair() for _ in range(3)]
        self.out, self.err, self.control = (here for here, _ in pairs)
        for here, _ in pairs:
            here.setblocking(False)
        theirs = [there for _, there in pairs]
        ports = Ports(*(there.fileno() for there in theirs))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                machine.qemu_command(kernel, run / "initramfs", run, ports, options, accelerator),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[there.fileno() for there in theirs],
                # A terminal's Ctrl-C is the command's, not QEMU's.
                start_new_session=True,
            )
        for there in theirs:
            there.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for end in (self.out, self.err, self.control):
            end.close()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def await_end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_BOUND_S)

    def console(self) -> str:
        return clean_console(self._console.read_bytes())

    def complaint(self) -> str | None:
        """Return QEMU's own error, where it did not get to start the guest."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else None

    def tell(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self.control.sendall(signal.Signals(number).name.removeprefix("SIG").encode() + b"\n")

    def read_reports(self) -> list[str]:
        """Return the lines that the guest has sent on the control port."""
        with contextlib.suppress(OSError):
            self._lines += self.control.recv(4096)
        *lines, self._lines = self._lines.split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class _Output:
    """One output stream of the command: passed on or kept, until the marker ends it."""

    def __init__(self, marker: bytes, target: BinaryIO | None) -> None:
        self.ended = False
        self._kept = bytearray()
        self._marker = marker
        self._target = target
        self._held = b""

    @property
    def kept(self) -> bytes | None:
        return bytes(self._kept) if self._target is None else None

    def feed(self, chunk: bytes) -> None:
        if self.ended:
            return
        text, found, _ = (self._held + chunk).partition(self._marker)
        self.ended = bool(found)
        # What may be the beginning of the marker waits for the next chunk.
        held = 0
        if not found:
            held = next(
                (
                    length
                    for length in range(min(len(self._marker) - 1, len(text)), 0, -1)
                    if text.endswith(self._marker[:length])
                ),
                0,
            )
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        self._emit(text)

    def close(self) -> None:
        """The stream ends here, with the marker or without."""
        self._emit(self._held)
        self._held = b""

    def _emit(self, text: bytes) -> None:
        if self._target is None:
            self._kept += text
        elif text:
            self._target.write(text)
            self._target.flush()


@contextlib.contextmanager
def _signals(pass_on: bool) -> Iterator[list[int]]:
    """Collect the signals that are for the command, for as long as the context lasts."""
    received: list[int] = []
    before = {}
    if pass_on:

        def collect(number: int, frame: FrameType | None) -> None:
            received.append(number)

        before = {number: signal.signal(number, collect) for number in _PASSED_ON}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _await_boot(guest: _Guest, signals: list[int]) -> Literal["up", "silent", "interrupted"]:
    until_s = guest.started_s + BOOT_BOUND_S[guest.accelerator]
    with selectors.DefaultSelector() as selector:
        selector.register(guest.control, selectors.EVENT_READ)
        while time.monotonic() < until_s:
            selector.select(_TICK_S)
            for report in guest.read_reports():
                if report.startswith(_LACKS):
                    raise CannotRun(
                        f"the guest could not be given {report.removeprefix(_LACKS)}",
                        "ask for less, or look whether its kernel has what that takes",
                    )
                if report == "up":
                    guest.boot_s = time.monotonic() - guest.started_s
                    return "up"
            if signals:
                return "interrupted"
            if guest.has_ended():
                # KVM may be refused at once, as well as hang.
                if guest.accelerator == "kvm" and not guest.console().strip():
                    return "silent"
                raise _lost(guest, "the guest ended while it booted", False)
    return "silent"


def _lost(guest: _Guest, otherwise: str, has_booted: bool = True) -> LostVM | BackendUnavailable:
    console = guest.console()
    complaint = guest.complaint()
    if not console.strip() and complaint is not None:
        return BackendUnavailable(
            f"QEMU failed: {complaint}", "does QEMU run here with less memory, or fewer options?"
        )
    death = find_death(console)
    return LostVM(
        f"the guest is lost: {death or otherwise}",
        "this says nothing about the command; above are the console's last lines"
        if has_booted
        else _GUESTS_TAKE,
        tail(console),
        has_booted,
    )


class _Run:
    """Follows a booted guest until the command has ended, or the guest has."""

    def __init__(
        self,
        guest: _Guest,
        out: _Output,
        err: _Output,
        signals: list[int],
        timeout_s: float | None,
    ) -> None:
        self._guest = guest
        self._out = out
        self._err = err
        self._signals = signals
        self._started_s = time.monotonic()
        self._deadline_s = None if timeout_s is None else self._started_s + timeout_s
        self._status: int | None = None
        self._ended_s: float | None = None
        self._heard_s = self._started_s
        self._outcome = Outcome.EXITED
        self._passed_on = 0
        self._kill_s: float | None = None

    def follow(self, booted: bool) -> VmResult:
        if not booted:
            self._outcome = Outcome.INTERRUPTED
            return self._result()
        outputs = {self._guest.out: self._out, self._guest.err: self._err}
        with selectors.DefaultSelector() as selector:
            for end in (*outputs, self._guest.control):
                selector.register(end, selectors.EVENT_READ)
            while not self._is_over():
                for key, _ in selector.select(_TICK_S):
                    assert isinstance(key.fileobj, socket.socket)
                    if key.fileobj is self._guest.control:
                        self._take_reports()
                    else:
                        _pump(key.fileobj, outputs[key.fileobj])
                if self._guest.has_ended():
                    # What it sent last is still in the sockets.
                    for end, output in outputs.items():
                        while not output.ended and _pump(end, output):
                            pass
                    self._take_reports()
                    break
        self._out.close()
        self._err.close()
        if self._status is None and self._outcome is Outcome.EXITED:
            raise _lost(self._guest, "it ended by itself, and did not report the command's end")
        return self._result()

    def _take_reports(self) -> None:
        for report in self._guest.read_reports():
            self._heard_s = time.monotonic()
            kind, _, status = report.partition(" ")
            if kind == "exit":
                self._status = int(status)
                self._ended_s = self._heard_s

    def _is_over(self) -> bool:
        now_s = time.monotonic()
        if self._ended_s is not None:
            return (self._out.ended and self._err.ended) or now_s > self._ended_s + _END_BOUND_S
        if len(self._signals) > self._passed_on:
            if self._passed_on:
                return True
            self._end_command(Outcome.INTERRUPTED, self._signals[0], now_s)
            self._passed_on = len(self._signals)
        elif self._deadline_s is not None and now_s > self._deadline_s and self._kill_s is None:
            self._end_command(Outcome.TIMED_OUT, signal.SIGTERM, now_s)
        if self._kill_s is not None and now_s > self._kill_s:
            return True
        if now_s > self._heard_s + SILENCE_BOUND_S:
            raise _lost(self._guest, f"it hangs: no sign of life for {SILENCE_BOUND_S:.0f} s")
        return False

    def _end_command(self, outcome: Outcome, number: int, now_s: float) -> None:
        self._outcome = outcome
        self._guest.tell(number)
        self._kill_s = now_s + GRACE_S

    def _result(self) -> VmResult:
        exit_status = 124
        if self._outcome is Outcome.INTERRUPTED:
            exit_status = 128 + self._signals[0]
        elif self._outcome is Outcome.EXITED:
            assert self._status is not None
            exit_status = min(self._status, 254)
        return VmResult(
            outcome=self._outcome,
            command_status=self._status,
            exit_status=exit_status,
            stdout=self._out.kept,
            stderr=self._err.kept,
            console=self._guest.console(),
            accelerator=self._guest.accelerator,
            boot_s=self._guest.boot_s,
            command_s=(self._ended_s or time.monotonic()) - self._started_s,
        )


def _pump(end: socket.socket, output: _Output) -> bool:
    """Take what has arrived, and return whether that was anything."""
    try:
        chunk = end.recv(1 << 16)
    except (BlockingIOError, ConnectionResetError):
        return False
    output.feed(chunk)
    return bool(chunk)
