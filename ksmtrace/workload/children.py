"""The processes of a workload: each maps private anonymous pages with known contents.

A child is forked without an exec, so the command must have one thread only. It does what it is
told over a pipe, one line at a time, and dies with the process that forked it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmtrace.errors import WorkloadFailed
from ksmtrace.workload.knobs import name_process, release_standard_streams
from ksmtrace.workload.signals import Stop

PAGE_BYTES = mmap.PAGESIZE

_PR_SET_PDEATHSIG = 1
_REAP_SECONDS = 10.0
_PR_SET_MEMORY_MERGE = 67  # include/uapi/linux/prctl.h, since 6.4
_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl
_madvise, _munmap, _mprotect = _libc.madvise, _libc.munmap, _libc.mprotect
_F_SETPIPE_SZ = 1031  # include/uapi/linux/fcntl.h
_HUGE_BYTES = 2 << 20
_MAP_NORESERVE = 0x4000  # include/uapi/asm-generic/mman-common.h
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Layout:
    """What one process maps.

    Page ``i`` has the content number ``(first + i) % contents``: pages are equal, in whichever
    process, if their numbers are.

    Attributes:
        comm: the process's name, at most 15 bytes.
        pages: how many pages it maps.
        first: content number of the first page.
        contents: how many contents there are; 0: all pages are empty.
    """

    comm: str
    pages: int
    first: int
    contents: int

    def content_numbers(self) -> range | list[int]:
        """Return the content number of each page."""
        if self.contents == 0:
            return [0] * self.pages
        return [(self.first + index) % self.contents for index in range(self.pages)]


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Channel:
    # Two pipes between the command and one child.

    def __init__(self) -> None:
        self.order_read, self.order_write = os.pipe2(os.O_CLOEXEC)
        self.answer_read, self.answer_write = os.pipe2(os.O_CLOEXEC)

    def close_near(self) -> None:
        # The command's ends.
        _close(self.order_write, self.answer_read)

    def close_far(self) -> None:
        # The child's ends.
        _close(self.order_read, self.answer_write)


class Child:
    """One process of a workload, as seen from the command."""

    def __init__(self, layout: Layout, channel: _Channel) -> None:
        self.layout = layout
        self.comm = layout.comm
        self.pid = 0
        self.channel = channel

    def tell(self, words: str) -> None:
        """Send an order; :meth:`wait_done` waits for its end."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.channel.order_write, words.encode() + b"\n")

    def wait_done(self, stop: Stop, timeout_seconds: float, what: str) -> str:
        """Wait for the answer to the last order.

        Args:
            stop: ends the wait when a signal comes.
            timeout_seconds: how long to wait.
            what: what is waited for, for the error.

        Returns:
            The answer after ``ok``.

        Raises:
            WorkloadFailed: the time was up, or the child failed or died.
        """
        deadline = time.monotonic() + timeout_seconds
        answer = b""
        while not answer.endswith(b"\n"):
            if not stop.wait_readable(self.channel.answer_read, deadline - time.monotonic()):
                raise WorkloadFailed(
                    f"waited {timeout_seconds:g} s for {self.comm} to {what}, in vain"
                )
            chunk = os.read(self.channel.answer_read, 4096)
            if not chunk:
                raise WorkloadFailed(f"{self.comm} (pid {self.pid}) died instead of: {what}")
            answer += chunk
        verdict, _, rest = answer.decode().strip().partition(" ")
        if verdict != "ok":
            raise WorkloadFailed(f"{self.comm} (pid {self.pid}) could not {what}: {rest}")
        return rest


class Children:
    """All processes of a workload; leaving the block ends them."""

    def __init__(self, stop: Stop, timeout_seconds: float) -> None:
        self._stop = stop
        self._timeout_seconds = timeout_seconds
        self._forked: list[Child] = []
        self._heirs: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    @property
    def all(self) -> list[Child]:
        """The living children, in the order in which KSM got to know them."""
        return self._forked + [heir for heir in self._heirs if heir.pid]

    def start(
        self,
        layouts: tuple[Layout, ...],
        heirs: tuple[Layout, ...] = (),
        register: bool = True,
    ) -> list[Child]:
        """Start processes, and register their memory with KSM in this order.

        Args:
            layouts: what each maps.
            heirs: what the forks of the first one will have mapped, see :meth:`fork_heirs`; only
                with the first processes that are started.
            register: whether to register it.

        Returns:
            The processes.
        """
        # The first child must inherit its forks' pipes, so they exist before it does.
        self._heirs += [Child(layout, _Channel()) for layout in heirs]
        started = [Child(layout, _Channel()) for layout in layouts]
        for child in started:
            self._fork(child)
        for child in started:
            child.wait_done(self._stop, self._timeout_seconds, "fill its pages")
        for child in started if register else ():
            self.order(child, "register", "register its pages with KSM")
        return started

    def fork_heirs(self) -> None:
        """Let the first child fork; the forks share its pages and its mergeable areas."""
        for index, heir in enumerate(self._heirs):
            pid = int(self.order(self._forked[0], f"fork {index}", "fork"))
            heir.pid = pid
            heir.channel.close_far()
            heir.wait_done(self._stop, self._timeout_seconds, "come to be")

    def rewrite(self, generation: int) -> None:
        """Give every page of every child a content that no page ever had.

        Args:
            generation: a number not used before.
        """
        for child in self._forked:
            child.tell(f"write {child.layout.pages} {generation}")
        for child in self._forked:
            child.wait_done(self._stop, self._timeout_seconds, "rewrite its pages")

    def write_first(self, nr_pages: int) -> None:
        """Let the first child give its first pages contents that no page ever had."""
        self.order(self._forked[0], f"write {nr_pages} 1", f"write to {nr_pages} of its pages")

    def end_one(self, child: Child) -> None:
        """Kill one child that has no heirs, and wait until it is gone, with its memory."""
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        child.channel.close_near()
        self._forked.remove(child)

    def end(self) -> None:
        """Kill every child and wait until it is gone, with its memory."""
        for child in reversed(self.all):
            # An heir is reaped by the child that forked it; its pid cannot be another's while
            # that child lives, and it does: the heirs come first here.
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            if child in self._heirs:
                _wait_gone(child.pid)
            else:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, 0)
            child.channel.close_near()
        for heir in self._heirs:
            if heir.pid == 0:
                heir.channel.close_far()
                heir.channel.close_near()
        self._forked, self._heirs = [], []

    def order(self, child: Child, words: str, what: str) -> str:
        """Let a child do something.

        Args:
            child: one of :attr:`all`.
            words: the order, see ``_ORDERS``.
            what: the same in words, for the error.

        Returns:
            Its answer.

        Raises:
            WorkloadFailed: it could not, or not in time.
        """
        child.tell(words)
        return child.wait_done(self._stop, self._timeout_seconds, what)

    def _fork(self, child: Child) -> None:
        parent = os.getpid()
        child.pid = os.fork()
        if child.pid:
            child.channel.close_far()
            self._forked.append(child)
            return
        try:
            for sibling in [*self._forked, child, *self._heirs]:
                # Else a sibling's end would not be seen while this one lives.
                sibling.channel.close_near()
            _begin(child.layout.comm, parent)
            _serve(child, self._heirs, _fill(child.layout))
        except BaseException as error:
            _answer(child, f"error {error!r}")
        finally:
            os._exit(0)


def _begin(comm: str, parent: int) -> None:
    for signum in (signal.SIGINT, signal.SIGHUP):
        # A terminal sends these to the whole group: the command decides, not each child.
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks of this child need no reaping
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    release_standard_streams()
    name_process(comm)


def _fill(layout: Layout) -> mmap.mmap:
    memory = mmap.mmap(-1, layout.pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages refuses the advice
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    for index, number in enumerate(layout.content_numbers()):
        at = index * PAGE_BYTES
        if layout.contents == 0:
            # A write makes it a page of its own; only then is it emptied.
            memory[at] = 1
            memory[at] = 0
        else:
            memory[at : at + PAGE_BYTES] = _content(b"ksmtrace content %d\n" % number)
    return memory


def _content(line: bytes) -> bytes:
    return (line * (PAGE_BYTES // len(line) + 1))[:PAGE_BYTES]


def _serve(child: Child, heirs: list[Child], memory: mmap.mmap) -> None:
    # The orders: fork INDEX, and those in _ORDERS. End of file ends the child.
    _answer(child, "ok")
    with os.fdopen(child.channel.order_read, "rb", buffering=0) as orders:
        for order in orders:
            word, *numbers = order.decode().split()
            if word == "fork":
                heir = heirs[int(numbers[0])]
                parent = os.getpid()
                pid = os.fork()
                if pid == 0:
                    _begin(heir.comm, parent)
                    _serve(heir, [], memory)
                    os._exit(0)
                heir.channel.close_far()
                _answer(child, f"ok {pid}")
            else:
                _answer(child, f"ok {_ORDERS[word](child, memory, *map(int, numbers))}")


def _register(child: Child, memory: mmap.mmap) -> str:
    memory.madvise(mmap.MADV_MERGEABLE)
    return ""


def _write(child: Child, memory: mmap.mmap, nr_pages: int, generation: int) -> str:
    for index in range(nr_pages):
        line = f"written {child.comm} {index} {generation}\n".encode()
        at = index * PAGE_BYTES
        memory[at : at + len(line)] = line
    return ""


def _copy(child: Child, memory: mmap.mmap, nr_pages: int) -> str:
    # A page of its own again, with the content that it had.
    for at in range(0, nr_pages * PAGE_BYTES, PAGE_BYTES):
        memory[at] = memory[at]
    return ""


def _start_of(child: Child, memory: mmap.mmap) -> str:
    return str(_address(memory))


def _digest(child: Child, memory: mmap.mmap, index: int) -> str:
    return str(zlib.crc32(memory[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]))


def _digest_all(child: Child, memory: mmap.mmap) -> str:
    return str(zlib.crc32(memory[:]))


def _pin(child: Child, memory: mmap.mmap, first: int, nr_pages: int) -> str:
    # A pipe holds a reference to each page, as long as nobody reads it.
    ends = os.pipe()
    _libc.fcntl(ends[1], _F_SETPIPE_SZ, ctypes.c_int(1 << 20))
    _pipes.extend(ends)
    vector = _IoVec(_address(memory) + first * PAGE_BYTES, nr_pages * PAGE_BYTES)
    taken = _libc.vmsplice(ends[1], ctypes.byref(vector), ctypes.c_ulong(1), 0)
    return str(max(taken, 0) // PAGE_BYTES)


def _unpin(child: Child, memory: mmap.mmap) -> str:
    _close(*_pipes)
    _pipes.clear()
    return ""


def _map_huge(child: Child, memory: mmap.mmap, contents: int) -> str:
    area = mmap.mmap(-1, 2 * _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -_address(area) % _HUGE_BYTES
    _madvise(_address(area) + start, _HUGE_BYTES, mmap.MADV_HUGEPAGE)
    for at in range(start, start + _HUGE_BYTES, PAGE_BYTES):
        number = (at - start) // PAGE_BYTES
        if contents:
            area[at : at + 8] = (1 + number % contents).to_bytes(8, "little")
        elif number == 0:
            # No content that another area has.
            area[at] = 255
    _madvise(_address(area) + start, _HUGE_BYTES, mmap.MADV_MERGEABLE)
    _kept.append(area)
    return str(_address(area) + start)


def _advise(child: Child, memory: mmap.mmap, advice: int, first: int, nr_pages: int) -> str:
    start = _address(memory) + first * PAGE_BYTES
    return _errno_of(_madvise(start, nr_pages * PAGE_BYTES, advice))


def _unmap(child: Child, memory: mmap.mmap, first: int, nr_pages: int) -> str:
    return _errno_of(_munmap(_address(memory) + first * PAGE_BYTES, nr_pages * PAGE_BYTES))


def _advise_shared(child: Child, memory: mmap.mmap, advice: int, nr_pages: int) -> str:
    # A mapping that is shared, and so can never be mergeable; it stays.
    shared = mmap.mmap(-1, nr_pages * PAGE_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    shared[0] = 1
    start = _address(shared)
    answer = _errno_of(_madvise(start, nr_pages * PAGE_BYTES, advice))
    _kept.append(shared)
    return f"{answer} {start}"


def _advise_crowded(child: Child, memory: mmap.mmap, advice: int, first: int, nr_pages: int) -> str:
    # With as many mappings as a process may have: every second page of a run gets other rights.
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    crowd = mmap.mmap(-1, (limit + 2) * PAGE_BYTES, flags=kind)
    begin = _address(crowd)
    for at in range(begin, begin + limit * PAGE_BYTES, 2 * PAGE_BYTES):
        if _mprotect(at, PAGE_BYTES, mmap.PROT_READ):
            break
    answer = _advise(child, memory, advice, first, nr_pages)
    _munmap(begin, len(crowd))
    _kept.append(crowd)
    return answer


def _merge_any(child: Child, memory: mmap.mmap) -> str:
    return _errno_of(_prctl(_PR_SET_MEMORY_MERGE, 1, 0, 0, 0))


_ORDERS: Mapping[str, Callable[..., str]] = {
    "register": _register,
    "write": _write,
    "copy": _copy,
    "start": _start_of,
    "digest": _digest,
    "digest_all": _digest_all,
    "pin": _pin,
    "unpin": _unpin,
    "map_huge": _map_huge,
    "advise": _advise,
    "unmap": _unmap,
    "advise_shared": _advise_shared,
    "advise_crowded": _advise_crowded,
    "merge_any": _merge_any,
}
"""What a child can be told, with numbers: ``register``; ``write N GENERATION`` to its first pages;
``copy N``: each of the first pages is written to without a change;
``start``, the address of its area; ``digest INDEX``, the content of a page as a number; ``advise
ADVICE FIRST N``, ``unmap FIRST N``: the errno, 0 for success; ``advise_shared ADVICE N``: the same
of a shared mapping made for it, and its address; ``advise_crowded ADVICE FIRST N``: the errno while
the process has as many mappings as it may have; ``merge_any``: prctl(PR_SET_MEMORY_MERGE);
``digest_all``: the content of all pages as a number; ``pin FIRST N``: references to pages, how many
were taken, and ``unpin`` gives them back; ``map_huge CONTENTS``: a mergeable area made for it of
one huge page, if the kernel gives one, with so many contents by turns, 0 for an empty one but for
the first byte, and its address."""

_kept: list[mmap.mmap] = []
_pipes: list[int] = []


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _errno_of(result: int) -> str:
    return str(ctypes.get_errno() if result else 0)


def _answer(child: Child, words: str) -> None:
    with contextlib.suppress(OSError):
        os.write(child.channel.answer_write, words.encode()[:1000] + b"\n")


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.002)


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
