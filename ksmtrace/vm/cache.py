"""Where kernels and findings about this machine are kept between runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ksmtrace.errors import CannotRun

Notify = Callable[[str], None]


def cache_directory(name: str = "kernels") -> Path:
    """Return one of ksmtrace's directories, made where it is missing (XDG base directories)."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "ksmtrace" / name
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CannotRun(
            f"cannot make the cache directory {directory}: {error.strerror}",
            "point XDG_CACHE_HOME at a directory that can be written",
        ) from error
    return directory


@contextlib.contextmanager
def locked(directory: Path, notify: Notify) -> Iterator[None]:
    """Hold the directory's lock; it goes with the process, so a killed one leaves none behind."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notify("waiting for another ksmtrace that fetches a kernel")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
