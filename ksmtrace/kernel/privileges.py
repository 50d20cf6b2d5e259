"""What this process may do, and what the kernel's settings forbid everyone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ksmtrace.errors import KernelInterfaceError
from ksmtrace.kernel.files import ROOT, parse_selected, read_int, read_text

CAPABILITY_BITS = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_KILL": 5,
    "CAP_NET_ADMIN": 12,
    "CAP_IPC_LOCK": 14,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
    "CAP_CHECKPOINT_RESTORE": 40,
}
"""The capabilities that matter here (include/uapi/linux/capability.h)."""


@dataclass(frozen=True)
class Privileges:
    """What this process may do.

    Attributes:
        euid: effective user id.
        capabilities: those of :data:`CAPABILITY_BITS` that are effective.
        lockdown: ``none``, ``integrity`` or ``confidentiality``; None where securityfs is not
            mounted or the kernel has no lockdown.
        unprivileged_bpf_disabled: kernel.unprivileged_bpf_disabled, None where absent.
        kptr_restrict: kernel.kptr_restrict, None where absent.
        perf_event_paranoid: kernel.perf_event_paranoid, None where absent.
    """

    euid: int
    capabilities: tuple[str, ...]
    lockdown: str | None
    unprivileged_bpf_disabled: int | None
    kptr_restrict: int | None
    perf_event_paranoid: int | None

    @property
    def may_trace(self) -> bool:
        """Whether tracing programs may be loaded: CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN."""
        held = set(self.capabilities)
        return "CAP_SYS_ADMIN" in held or {"CAP_BPF", "CAP_PERFMON"} <= held

    @property
    def may_read_pfns(self) -> bool:
        """Whether /proc/PID/pagemap shows frame numbers (fs/proc/task_mmu.c:pagemap_open)."""
        return "CAP_SYS_ADMIN" in self.capabilities


def read_privileges(root: Path = ROOT) -> Privileges:
    """Read what this process may do, from /proc/self/status and kernel settings.

    Raises:
        KernelInterfaceError: /proc/self/status is absent or malformed.
    """
    path = f"{root}/proc/self/status"
    lines = dict(
        line.partition(":")[::2] for line in (read_text(path) or "").splitlines() if ":" in line
    )
    try:
        euid = int(lines["Uid"].split()[1])
        effective = int(lines["CapEff"], 16)
    except (KeyError, ValueError, IndexError):
        raise KernelInterfaceError(f"{path} has no Uid and CapEff", "mount proc on /proc") from None
    lockdown_path = f"{root}/sys/kernel/security/lockdown"
    lockdown = read_text(lockdown_path)
    settings = f"{root}/proc/sys/kernel"
    return Privileges(
        euid=euid,
        capabilities=tuple(n for n, bit in CAPABILITY_BITS.items() if effective >> bit & 1),
        lockdown=None if lockdown is None else parse_selected(lockdown, lockdown_path),
        unprivileged_bpf_disabled=read_int(f"{settings}/unprivileged_bpf_disabled"),
        kptr_restrict=read_int(f"{settings}/kptr_restrict"),
        perf_event_paranoid=read_int(f"{settings}/perf_event_paranoid"),
    )
