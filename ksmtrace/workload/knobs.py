"""KSM's knobs: saved before the first change, restored on every way out.

A guardian process does the restoring when the command cannot: it is forked before the first
knob is written, and acts when the last process of the command is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator, Mapping

from ksmtrace.errors import CannotRun, KernelFeatureMissing, KernelInterfaceError, PrivilegeMissing
from ksmtrace.kernel.sysfs import DIRECTORY, read_ksm
from ksmtrace.workload.ownership import Ownership, take_ownership
from ksmtrace.workload.registered import nr_rmap_items, registered_processes

KNOBS = (
    # sleep_millisecs goes first: a new value wakes ksmd from a long sleep.
    "sleep_millisecs",
    "merge_across_nodes",
    "max_page_sharing",
    "stable_node_chains_prune_millisecs",
    "use_zero_pages",
    "smart_scan",
    # Refused (EINVAL) while the advisor is on (mm/ksm.c:pages_to_scan_store), so before its mode.
    "pages_to_scan",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
    "advisor_mode",
    "run",
)
"""Every writable file of /sys/kernel/mm/ksm, in the order in which they are restored."""

TREE_KNOBS = frozenset({"merge_across_nodes", "max_page_sharing"})
"""Refused (EBUSY) while pages are shared (mm/ksm.c:max_page_sharing_store)."""

ADVISOR_OFF = "none"
STOP, SCAN, UNMERGE = "0", "1", "2"

_DISMISSED = b"d"


class SavedKnobs:
    """The knobs as they were, and the one way of writing them meanwhile."""

    def __init__(self, before: Mapping[str, str], alone: bool) -> None:
        self.before = dict(before)
        """Each knob's value before the first change; only those that this kernel has."""
        self.alone = alone
        """Whether no living process used KSM at the start: what it knows of is ours."""
        self.keep_leftovers = False
        """Restore without making KSM forget what exited processes left behind."""

    def set(self, **values: int | str) -> None:
        """Write the knobs whose value differs, in the order given.

        Raises:
            KernelFeatureMissing: this kernel has no such knob.
            CannotRun: the kernel refused a value.
        """
        for name, value in values.items():
            if name not in self.before:
                raise KernelFeatureMissing(f"this kernel has no /{DIRECTORY}/{name}")
            if read_knobs()[name] == str(value):
                continue
            set_knob(name, str(value))

    def __contains__(self, name: str) -> bool:
        return name in self.before


def set_knob(name: str, value: str) -> None:
    """Write a knob.

    Raises:
        CannotRun: the kernel refused the value.
    """
    try:
        _write_knob(name, value)
    except OSError as error:
        raise CannotRun(
            f"the kernel refused {value} for /{DIRECTORY}/{name}: {_why(name, error)}"
        ) from error


@contextlib.contextmanager
def saved_knobs(report: Callable[[str], None] = lambda line: None) -> Iterator[SavedKnobs]:
    """Own the knobs for the block, and leave them as they were.

    Must be entered in a process that has one thread only: it forks a guardian.

    Args:
        report: takes a line if knobs that a killed ksmtrace left changed are restored first,
            and one for each knob that could not be restored.

    Raises:
        PrivilegeMissing: this user may not write them.
        KernelFeatureMissing: the kernel is built without KSM.
        CannotRun: another ksmtrace owns them, or some could not be restored.
    """
    read_ksm()
    _check_writable()
    ownership = take_ownership()
    try:
        if ownership.orphan is not None:
            _restore_orphan(ownership, report)
        knobs = SavedKnobs(read_knobs(), alone=not registered_processes())
        ownership.publish(knobs.before)
        guardian = _Guardian(knobs, ownership)
        try:
            yield knobs
        except BaseException:
            knobs.keep_leftovers = False
            raise
        finally:
            # Signals are held back: from here on the only way is through.
            held = signal.pthread_sigmask(
                signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
            )
            try:
                problems = restore(knobs)
                for problem in problems:
                    report(problem)
                guardian.dismiss()
                ownership.settle()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if problems:
            raise CannotRun(
                f"{len(problems)} of the KSM knobs could not be restored, see above",
                "write the old value once nothing is merged",
            )
    finally:
        ownership.close()


def read_knobs() -> dict[str, str]:
    """Read the value of every knob that this kernel has, as it would be written."""
    values = read_ksm()
    return {name: str(values[name]) for name in KNOBS if values[name] is not None}


def restore(knobs: SavedKnobs) -> list[str]:
    """Write back every knob that differs.

    Pages that exited processes left merged keep max_page_sharing and merge_across_nodes from
    changing; KSM is made to forget them (run=2) when no living process used it before us or
    uses it now.

    Returns:
        A line for each knob that could not be restored: its value, the old one, the reason.
    """
    differing = _differing(knobs)
    leftovers = knobs.alone and nr_rmap_items(read_ksm()) > 0
    if leftovers and (not knobs.keep_leftovers or TREE_KNOBS & differing):
        forget_exited()
        differing = _differing(knobs)
    if not differing:
        return []
    problems = _try_write(knobs, "run", STOP)
    advisor_mode = read_knobs().get("advisor_mode", ADVISOR_OFF)
    if "pages_to_scan" in differing and advisor_mode != ADVISOR_OFF:
        problems += _try_write(knobs, "advisor_mode", ADVISOR_OFF)
    for name in KNOBS:
        if name == "pages_to_scan" and knobs.before.get("advisor_mode") not in (ADVISOR_OFF, None):
            # The advisor's own, which it sets anew when it is switched on.
            continue
        if name in _differing(knobs):
            problems += _try_write(knobs, name, knobs.before[name])
    return problems


def forget_exited() -> None:
    """Make KSM forget all pages with run=2, unless a living process has registered memory.

    A successful run=2 also sets full_scans to 0
    (mm/ksm.c:unmerge_and_remove_all_rmap_items).
    """
    if registered_processes():
        return
    with contextlib.suppress(OSError):
        # Writing the value that run already has does nothing (mm/ksm.c:run_store).
        for value in (STOP, UNMERGE, STOP):
            _write_knob("run", value)


def _differing(knobs: SavedKnobs) -> set[str]:
    now = read_knobs()
    return {name for name, value in knobs.before.items() if now.get(name) != value}


def _write_knob(name: str, value: str) -> None:
    fd = os.open(f"/{DIRECTORY}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _try_write(knobs: SavedKnobs, name: str, value: str) -> list[str]:
    try:
        _write_knob(name, value)
    except OSError as error:
        return [
            f"/{DIRECTORY}/{name} stays {read_knobs()[name]} (it was {knobs.before[name]}): "
            f"{_why(name, error)}"
        ]
    return []


def _why(name: str, error: OSError) -> str:
    code = errno.errorcode.get(error.errno or 0, str(error.errno))
    if name in TREE_KNOBS and error.errno == errno.EBUSY:
        pages_shared = read_ksm()["pages_shared"]
        return f"{code}, it changes only while nothing is shared and pages_shared is {pages_shared}"
    return code


def _check_writable() -> None:
    path = f"/{DIRECTORY}/run"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, str(error.errno))
        if error.errno in (errno.EACCES, errno.EPERM):
            raise PrivilegeMissing(f"{path} cannot be written: {code}", "run as root") from error
        if error.errno == errno.EROFS:
            raise KernelInterfaceError(
                f"{path} cannot be written: {code}", "mount sysfs read-write"
            ) from error
        raise KernelInterfaceError(f"{path} cannot be written: {code}") from error


def _restore_orphan(ownership: Ownership, report: Callable[[str], None]) -> None:
    # Command and guardian were both killed: what they saved is still what the machine should have.
    orphan = ownership.orphan
    assert orphan is not None
    report(
        f"pid {orphan.pid} ({orphan.command}) was killed together with its guardian: restoring "
        "the KSM knobs that it left changed"
    )
    saved = {name: value for name, value in orphan.saved.items() if name in KNOBS}
    problems = restore(SavedKnobs(saved, alone=True))
    if problems:
        raise CannotRun("; ".join(problems), f"restore them by hand and remove {ownership.path}")
    ownership.settle()


class _Guardian:
    # A process in a session of its own, deaf to the signals that end the command. It reads a pipe
    # whose write end the command and all processes forked from it hold: end of file means that
    # they are all gone. It shares the lock, so the knobs have an owner until they are restored.

    def __init__(self, knobs: SavedKnobs, ownership: Ownership) -> None:
        read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._write_fd)
                _guard(read_fd, knobs, ownership)
            finally:
                os._exit(0)
        os.close(read_fd)

    def dismiss(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._write_fd, _DISMISSED)
        os.close(self._write_fd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _guard(read_fd: int, knobs: SavedKnobs, ownership: Ownership) -> None:
    os.setsid()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_IGN)
    release_standard_streams()
    name_process("ksm-guardian")
    if os.read(read_fd, 1) == _DISMISSED:
        return
    for problem in restore(knobs):
        with contextlib.suppress(OSError):
            os.write(2, f"ksmtrace: {problem}\n".encode())
    ownership.settle()


def release_standard_streams() -> None:
    """Point stdin and stdout to /dev/null, so that a reader of the command's sees its end."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def name_process(comm: str) -> None:
    """Set the calling process's comm, at most 15 bytes."""
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/comm", os.O_WRONLY)
        os.write(fd, comm.encode()[:15])
        os.close(fd)
