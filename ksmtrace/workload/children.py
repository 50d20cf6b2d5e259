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
from dataclasses import dataclass

from ksmtrace.errors import WorkloadFailed
from ksmtrace.workload.knobs import name_process, release_standard_streams
from ksmtrace.workload.signals import Stop

PAGE_BYTES = mmap.PAGESIZE

_PR_SET_PDEATHSIG = 1
_REAP_SECONDS = 10.0
_prctl = ctypes.CDLL(None, use_errno=True).prctl


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

    def start(self, layouts: tuple[Layout, ...], heirs: tuple[Layout, ...] = ()) -> None:
        """Start processes, and register their memory with KSM in this order.

        Args:
            layouts: what each maps.
            heirs: what the forks of the first one will have mapped, see :meth:`fork_heirs`.
        """
        # The first child must inherit its forks' pipes, so they exist before it does.
        self._heirs = [Child(layout, _Channel()) for layout in heirs]
        for layout in layouts:
            self._fork(Child(layout, _Channel()))
        for child in self._forked:
            child.wait_done(self._stop, self._timeout_seconds, "fill its pages")
        for child in self._forked:
            self._order(child, "register", "register its pages with KSM")

    def fork_heirs(self) -> None:
        """Let the first child fork; the forks share its pages and its mergeable areas."""
        for index, heir in enumerate(self._heirs):
            pid = int(self._order(self._forked[0], f"fork {index}", "fork"))
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
        self._order(self._forked[0], f"write {nr_pages} 1", f"write to {nr_pages} of its pages")

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

    def _order(self, child: Child, words: str, what: str) -> str:
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
    # The orders: register; write N GENERATION; fork INDEX. End of file ends the child.
    _answer(child, "ok")
    with os.fdopen(child.channel.order_read, "rb", buffering=0) as orders:
        for order in orders:
            word, *numbers = order.decode().split()
            if word == "register":
                memory.madvise(mmap.MADV_MERGEABLE)
                _answer(child, "ok")
            elif word == "write":
                nr_pages, generation = map(int, numbers)
                for index in range(nr_pages):
                    line = f"written {child.comm} {index} {generation}\n".encode()
                    at = index * PAGE_BYTES
                    memory[at : at + len(line)] = line
                _answer(child, "ok")
            elif word == "fork":
                heir = heirs[int(numbers[0])]
                parent = os.getpid()
                pid = os.fork()
                if pid == 0:
                    _begin(heir.comm, parent)
                    _serve(heir, [], memory)
                    os._exit(0)
                heir.channel.close_far()
                _answer(child, f"ok {pid}")


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
