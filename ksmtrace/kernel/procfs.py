"""What /proc says of one process: KSM's figures, mappings, identity, CPU time.

A process that vanishes at any point is None, never an error: that is what processes do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ksmtrace.errors import KernelInterfaceError
from ksmtrace.kernel.files import ROOT, parse_int, read_file

KSM_STAT_KEYS = (
    "ksm_rmap_items",
    "ksm_zero_pages",
    "ksm_merging_pages",
    "ksm_process_profit",
    "ksm_merge_any",
    "ksm_mergeable",
)
"""Every key of /proc/PID/ksm_stat that a kernel up to 7.3 prints (fs/proc/base.c)."""

_NO_VALUES: dict[str, int | str | None] = dict.fromkeys(KSM_STAT_KEYS)
_WORDS = frozenset({"ksm_merge_any", "ksm_mergeable"})
_PF_KTHREAD = 0x0020_0000  # include/linux/sched.h; /proc/PID/stat prints task_struct.flags


@dataclass(frozen=True)
class MappingKsm:
    """One mapping in /proc/PID/smaps.

    Attributes:
        start: first address.
        end: first address after it.
        ksm_bytes: size of the KSM pages mapped here, KSM zero pages excluded
            (fs/proc/task_mmu.c:smaps_page_accumulate); None where smaps has no ``KSM:`` line.
        mergeable: flag ``mg``, VM_MERGEABLE: ksmd looks at this mapping.
    """

    start: int
    end: int
    ksm_bytes: int | None
    mergeable: bool


@dataclass(frozen=True)
class ProcessIdentity:
    """Who a pid is.

    Attributes:
        pid: tgid in the pid namespace of the /proc that was read.
        ppid: parent's tgid there; 0 where it is in no namespace visible here.
        comm: name.
        start_ns: start on CLOCK_BOOTTIME, in steps of a clock tick (10 ms).
        cgroup: path in the unified hierarchy (of the memory controller where that is not used),
            None where unknown.
        guest: name of the guest that a QEMU process runs, None for any other process.
    """

    pid: int
    ppid: int
    comm: str
    start_ns: int
    cgroup: str | None
    guest: str | None


def iter_pids(root: Path = ROOT) -> Iterator[int]:
    """Yield the pid of every process, lowest first."""
    try:
        names = [entry.name for entry in os.scandir(root / "proc")]
    except OSError as error:
        raise KernelInterfaceError(f"{root}/proc cannot be listed: {error.strerror}") from error
    yield from sorted(int(name) for name in names if name.isdecimal())


def read_ksm_stat(pid: int | str, root: Path = ROOT) -> dict[str, int | str | None] | None:
    """Read what KSM counts for one process.

    Args:
        pid: a pid, or ``"self"``.
        root: the tree that has ``proc``.

    Returns:
        Every key of :data:`KSM_STAT_KEYS`; None for one that this kernel does not print.
        ``ksm_merge_any`` and ``ksm_mergeable`` are ``"yes"`` or ``"no"``. None instead of the
        dict where the process is gone, or has no memory (kernel threads, zombies).

    Raises:
        PrivilegeMissing: another user's process, without CAP_SYS_PTRACE.
        KernelInterfaceError: a line that is no known form.
    """
    directory = f"{root}/proc/{pid}"
    content = read_file(f"{directory}/ksm_stat")
    if content == b"":
        return None
    values = dict(_NO_VALUES)
    if content is not None:
        for line in content.decode(errors="replace").splitlines():
            # Two styles in one file since 6.16: "ksm_rmap_items 0" and "ksm_merge_any: yes".
            key, _, value = line.replace(":", " ", 1).partition(" ")
            value = value.strip()
            if key in _WORDS:
                values[key] = value
            elif key in values:
                values[key] = parse_int(value.encode(), f"{directory}/ksm_stat {key}")
            elif not value:
                raise KernelInterfaceError(f"{directory}/ksm_stat has the line {line[:60]!r}")
    if values["ksm_merging_pages"] is None:
        merging = read_file(f"{directory}/ksm_merging_pages")
        if merging:
            values["ksm_merging_pages"] = parse_int(merging, f"{directory}/ksm_merging_pages")
    if content is None and not Path(directory).is_dir():
        return None
    return values


def read_smaps_ksm(pid: int | str, root: Path = ROOT) -> list[MappingKsm] | None:
    """Read every mapping of a process with its KSM bytes and whether it is mergeable.

    Walks the process's page tables in the kernel: not for a loop over all processes.

    Returns:
        The mappings by address; None where the process is gone.

    Raises:
        PrivilegeMissing: another user's process, without CAP_SYS_PTRACE.
        KernelInterfaceError: a line that is no known form.
    """
    path = f"{root}/proc/{pid}/smaps"
    content = read_file(path)
    if content is None:
        return None
    mappings: list[MappingKsm] = []
    span: tuple[int, int] | None = None
    ksm_bytes: int | None = None
    for line in content.splitlines():
        word, _, rest = line.partition(b" ")
        if not word.endswith(b":"):
            span, ksm_bytes = _parse_span(word, path), None
        elif word == b"KSM:":
            ksm_bytes = parse_int(rest.strip().removesuffix(b"kB"), f"{path} KSM:") * 1024
        elif word == b"VmFlags:":
            # The last line of every mapping (fs/proc/task_mmu.c:show_smap).
            if span is None:
                raise KernelInterfaceError(f"{path} has VmFlags before any mapping")
            mappings.append(MappingKsm(*span, ksm_bytes, b"mg" in rest.split()))
            span = None
    return mappings


def _parse_span(word: bytes, path: str) -> tuple[int, int]:
    start, _, end = word.partition(b"-")
    try:
        return int(start, 16), int(end, 16)
    except ValueError:
        raise KernelInterfaceError(f"{path} has {word[:40]!r} for a mapping") from None


def read_identity(pid: int, root: Path = ROOT) -> ProcessIdentity | None:
    """Read who a process is; None where it is gone.

    Raises:
        KernelInterfaceError: /proc/PID/stat is malformed.
    """
    stat = _read_stat(pid, root)
    if stat is None:
        return None
    comm, fields = stat
    return ProcessIdentity(
        pid=pid,
        ppid=fields[1],
        comm=comm,
        start_ns=fields[19] * (1_000_000_000 // os.sysconf("SC_CLK_TCK")),
        cgroup=_read_cgroup(pid, root),
        guest=_read_guest(pid, root),
    )


# Returns comm, and the fields after it as numbers: [0] is the state (0), [1] field 4, ppid.
def _read_stat(pid: int, root: Path) -> tuple[str, list[int]] | None:
    path = f"{root}/proc/{pid}/stat"
    content = read_file(path)
    if not content:
        return None
    # comm stands in parentheses and may itself hold spaces and parentheses: the last one ends it.
    begin, end = content.find(b"("), content.rfind(b")")
    try:
        if not 0 < begin < end:
            raise ValueError
        numbers = [0, *map(int, content[end + 1 :].split()[1:])]
        if len(numbers) < 20:
            raise ValueError
    except ValueError:
        raise KernelInterfaceError(f"{path} holds {content[:60]!r}") from None
    # The kernel writes newline and backslash as \n and \\ (fs/proc/array.c:proc_task_name).
    name = content[begin + 1 : end].replace(b"\\n", b"\n").replace(b"\\\\", b"\\")
    return name.decode(errors="replace"), numbers


def _read_cgroup(pid: int, root: Path) -> str | None:
    content = read_file(f"{root}/proc/{pid}/cgroup")
    unified = memory = None
    for line in (content or b"").decode(errors="replace").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            unified = path
        elif "memory" in controllers.split(","):
            memory = path
    # Where the memory controller has a hierarchy of its own, the unified one can be unused, with
    # every process in its root.
    return memory if unified in (None, "/") and memory is not None else unified


def _read_guest(pid: int, root: Path) -> str | None:
    try:
        content = read_file(f"{root}/proc/{pid}/cmdline")
    except KernelInterfaceError:
        # The command line lies in the process's own memory and can be unreadable (EIO).
        return None
    arguments = (content or b"").decode(errors="replace").split("\0")
    executable = arguments[0].rpartition("/")[2]
    if not (executable.startswith("qemu") or executable == "kvm"):
        return None
    for option, value in itertools.pairwise(arguments[1:]):
        if option in ("-name", "--name"):
            return parse_guest_name(value)
    return None


def parse_guest_name(value: str) -> str | None:
    """Parse the value of QEMU's ``-name``: ``web1``, ``guest=web1,debug-threads=on``.

    Args:
        value: comma-separated settings; ``,,`` is a comma inside a name. The first one may be
            the guest's name without ``guest=``.

    Returns:
        The guest's name; None where the value gives none.
    """
    settings = value.replace(",,", "\0").split(",")
    named = [setting[6:] for setting in settings if setting.startswith("guest=")]
    if not named and "=" not in settings[0]:
        named = settings[:1]
    name = named[-1].replace("\0", ",") if named else ""
    return name or None


def find_ksmd(root: Path = ROOT) -> int | None:
    """Find the kernel thread ksmd.

    Returns:
        Its pid; None where there is none here: no KSM, or a pid namespace of one's own.
    """
    for pid in iter_pids(root):
        try:
            stat = _read_stat(pid, root)
        except KernelInterfaceError:
            continue
        # Any process may call itself ksmd; only a kernel thread has the flag.
        if stat is not None and stat[0] == "ksmd" and stat[1][6] & _PF_KTHREAD:
            return pid
    return None


def read_ksmd_schedstat(pid: int, root: Path = ROOT) -> dict[str, int] | None:
    """Read the scheduler's figures of ksmd, or of any other task.

    Returns:
        ``cpu_ns`` (se.sum_exec_runtime: on the CPU), ``run_delay_ns`` (sched_info.run_delay:
        runnable and waiting), ``timeslices`` (sched_info.pcount), since the task began
        (fs/proc/base.c:proc_pid_schedstat). None where it is gone or the kernel lacks
        CONFIG_SCHED_INFO.

    Raises:
        KernelInterfaceError: the file is malformed.
    """
    path = f"{root}/proc/{pid}/schedstat"
    content = read_file(path)
    if not content:
        return None
    try:
        cpu_ns, run_delay_ns, timeslices = map(int, content.split())
    except ValueError:
        raise KernelInterfaceError(f"{path} holds {content[:60]!r}") from None
    return {"cpu_ns": cpu_ns, "run_delay_ns": run_delay_ns, "timeslices": timeslices}
