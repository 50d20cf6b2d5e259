"""The lock that makes one ksmtrace at a time the owner of KSM's knobs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmtrace.errors import CannotRun

LOCK_NAME = "ksmtrace-knobs.lock"
_GUARDIAN_SECONDS = 10.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Claim:
    """What an owner writes into the lock file.

    Attributes:
        pid: of the command, not of its guardian.
        command: its command line.
        boot_id: of the boot in which the knobs were saved.
        saved: the knobs' values before the first change.
    """

    pid: int
    command: str
    boot_id: str
    saved: Mapping[str, str]


class Ownership:
    """An exclusive ``flock``, shared with every process forked while it is held."""

    def __init__(self, fd: int, path: Path, orphan: Claim | None) -> None:
        self._fd = fd
        self.path = path
        self.orphan = orphan
        """The claim of an owner that died together with its guardian, or None."""

    def publish(self, saved: Mapping[str, str]) -> None:
        """Write into the lock file who owns the knobs and what they were."""
        claim = {
            "pid": os.getpid(),
            "command": _own_command(),
            "boot_id": _boot_id(),
            "saved": dict(saved),
        }
        content = json.dumps(claim).encode()
        os.pwrite(self._fd, content, 0)
        os.ftruncate(self._fd, len(content))

    def settle(self) -> None:
        """Write into the lock file that the knobs are as they were."""
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Let go; the lock is free once every process forked meanwhile has let go too."""
        os.close(self._fd)


def lock_path() -> Path:
    """Return where the lock file is: /run, else the user's runtime directory, else /tmp."""
    for directory in (Path("/run"), Path(os.environ.get("XDG_RUNTIME_DIR", "/nonexistent"))):
        if os.access(directory, os.W_OK | os.X_OK):
            return directory / LOCK_NAME
    return Path(tempfile.gettempdir()) / LOCK_NAME


def take_ownership(path: Path | None = None) -> Ownership:
    """Become the owner of KSM's knobs.

    An owner that is gone while the lock is taken has left it to its guardian, which is waited
    for up to ten seconds.

    Raises:
        CannotRun: another ksmtrace owns them; the message says which.
    """
    path = path or lock_path()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    deadline = time.monotonic() + _GUARDIAN_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = _read_claim(fd)
            alive = owner is not None and Path(f"/proc/{owner.pid}").exists()
            if not alive and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                continue
            os.close(fd)
            who = f"pid {owner.pid} ({owner.command})" if owner else "another process"
            raise CannotRun(
                f"the KSM knobs are held by {who}",
                f"wait for it to end, or end it; the lock is {path}",
            ) from None
    orphan = _read_claim(fd)
    if orphan is not None and orphan.boot_id != _boot_id():
        orphan = None
    return Ownership(fd, path, orphan)


def _read_claim(fd: int) -> Claim | None:
    # The owner may be writing just now: half a claim is none.
    with contextlib.suppress(ValueError, TypeError, KeyError):
        claim = json.loads(os.pread(fd, 1 << 16, 0))
        saved = {str(name): str(value) for name, value in claim["saved"].items()}
        return Claim(int(claim["pid"]), str(claim["command"]), str(claim["boot_id"]), saved)
    return None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _own_command() -> str:
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    return " ".join(word.decode(errors="replace") for word in words if word)[:200]
