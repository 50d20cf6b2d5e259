"""A cgroup that processes of a trial live in, so that memory gets short for them alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ksmtrace.errors import CannotRun
from ksmtrace.kernel.files import read_text
from ksmtrace.workload.children import PAGE_BYTES

_CONTROLLED = "cgroup.subtree_control"
_PROCS = "cgroup.procs"


class Group:
    """One cgroup (version 2) with the memory controller."""

    def __init__(self, folder: Path, home: Path) -> None:
        self._folder = folder
        self._home = home

    @contextlib.contextmanager
    def births(self) -> Iterator[None]:
        """Let the processes that are started within the block belong to the group.

        Their memory is charged to it; that of processes that moved in later would not be
        (mm/memcontrol.c).

        Raises:
            CannotRun: this process may not change its cgroup.
        """
        _move(os.getpid(), self._folder)
        try:
            yield
        finally:
            _move(os.getpid(), self._home)

    def swap_out(self) -> None:
        """Let the kernel reclaim all that it can (memory.high, and back)."""
        (self._folder / "memory.high").write_text("0")
        (self._folder / "memory.high").write_text("max")

    def leave_pages(self, spare: int | None) -> None:
        """Limit its memory to what it uses now and so many pages more; None takes the limit off."""
        if spare is None:
            (self._folder / "memory.max").write_text("max")
            return
        swap = self._folder / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")
        used_bytes = int((self._folder / "memory.current").read_text())
        (self._folder / "memory.max").write_text(str(used_bytes + spare * PAGE_BYTES))

    def event(self, name: str) -> int:
        """Return a count of memory.events, such as ``oom`` and ``oom_kill``.

        Raises:
            CannotRun: this kernel does not count that.
        """
        lines = (self._folder / "memory.events").read_text().splitlines()
        counts = {key: int(value) for key, value in map(str.split, lines)}
        if name not in counts:
            raise CannotRun(f"memory.events of cgroups has no {name}")
        return counts[name]


@contextlib.contextmanager
def make_group(name: str) -> Iterator[Group]:
    """Make a cgroup; leaving the block moves out who is still in it, and removes it.

    Raises:
        CannotRun: there is no cgroup 2 with the memory controller.
    """
    base = _mount_point()
    if base is None or "memory" not in (read_text(str(base / "cgroup.controllers")) or "").split():
        raise CannotRun("cgroup 2 has no memory controller here")
    path = next(
        line[3:]
        for line in (read_text("/proc/self/cgroup") or "0::/").splitlines()
        if line.startswith("0::")
    )
    switched_on = "memory" not in (base / _CONTROLLED).read_text().split()
    folder = base / f"ksmtrace-{name}-{os.getpid()}"
    try:
        if switched_on:
            (base / _CONTROLLED).write_text("+memory")
        folder.mkdir()
    except OSError as error:
        raise CannotRun(f"no cgroup can be made: {error.strerror}") from error
    try:
        yield Group(folder, base / path.lstrip("/"))
    finally:
        (folder / "memory.max").write_text("max")
        for pid in (folder / _PROCS).read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (base / _PROCS).write_text(pid)
        folder.rmdir()
        if switched_on:
            (base / _CONTROLLED).write_text("-memory")


def _move(pid: int, folder: Path) -> None:
    try:
        (folder / _PROCS).write_text(str(pid))
    except OSError as error:
        raise CannotRun(f"a process cannot be moved to {folder}: {error.strerror}") from error


def _mount_point() -> Path | None:
    for line in (read_text("/proc/mounts") or "").splitlines():
        _, point, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(point)
    return None
