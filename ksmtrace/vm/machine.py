"""The virtual machine: QEMU's command line, the initramfs, and which accelerator works here."""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ksmtrace.errors import BackendUnavailable, UsageError
from ksmtrace.vm.cache import Notify, cache_directory
from ksmtrace.vm.kernels import Kernel

Accelerator = Literal["kvm", "tcg"]

MIB = 1 << 20
_GUEST_ONLY = tuple(Path(path) for path in ("/proc", "/sys", "/dev"))


@dataclass(frozen=True)
class VmOptions:
    """What a guest consists of.

    Attributes:
        memory_bytes: memory at boot, of all NUMA nodes together.
        cpus: virtual CPUs; emulated by one thread, so more of them make nothing faster.
        numa_nodes: NUMA nodes, which share memory and CPUs evenly.
        swap_bytes: size of the swap on compressed memory (zram); 0 for none.
        needs_swap: False: the command runs without it where the kernel has no zram.
        hotplug_bytes: memory beyond ``memory_bytes`` that is in ZONE_MOVABLE, so that its blocks
            can be taken offline.
        writable: host directories that the guest really writes to.
        append: further kernel arguments.
        accelerator: None to find out.
    """

    memory_bytes: int = 2048 * MIB
    cpus: int = 1
    numa_nodes: int = 1
    swap_bytes: int = 0
    needs_swap: bool = True
    hotplug_bytes: int = 0
    writable: Sequence[Path] = ()
    append: Sequence[str] = ()
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        if self.memory_bytes < 256 * MIB:
            raise UsageError("a guest needs at least 256M of memory", "give more with --memory")
        if self.hotplug_bytes % (128 * MIB):
            raise UsageError("hot-pluggable memory comes in blocks of 128M")


@dataclass(frozen=True)
class Ports:
    """The descriptors that QEMU inherits for the three virtio ports of the guest."""

    out: int
    err: int
    control: int


def check_writable(directories: Sequence[Path]) -> tuple[Path, ...]:
    """Return the directories as absolute paths, outer ones first."""
    resolved = sorted({directory.resolve() for directory in directories})
    for directory in resolved:
        if not directory.is_dir():
            raise UsageError(f"{directory} is no directory", "make it before the guest starts")
        if directory == Path("/") or any(
            directory.is_relative_to(guest_only) for guest_only in _GUEST_ONLY
        ):
            raise UsageError(f"{directory} cannot be writable in a guest", "it is the guest's own")
        if "\n" in str(directory):
            raise UsageError("a writable directory's name may have no line end")
    return tuple(resolved)


def write_run_directory(
    run: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    working_directory: Path,
    marker: str,
    kernel: Kernel,
    options: VmOptions,
) -> None:
    """Write what the guest reads: its init, its settings, and the command as a script."""
    init = importlib.resources.files("ksmtrace.vm").joinpath("guest-init").read_text()
    (run / "init").write_text(init)
    (run / "init").chmod(0o755)
    settings = {
        "marker": marker,
        "release": kernel.release,
        "modules": str(kernel.modules or ""),
        "swap": str(options.swap_bytes),
        "needs_swap": "yes" if options.needs_swap else "",
        "writable": "".join(f"{directory}\n" for directory in options.writable),
    }
    (run / "settings").write_text(
        "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
    )
    script = command_script(command, environment, working_directory)
    (run / "command").write_bytes(os.fsencode(script))


def command_script(
    command: Sequence[str], environment: Mapping[str, str], working_directory: Path
) -> str:
    """Return a POSIX shell script that becomes the command: nothing in its words is interpreted.

    Variables whose names a shell cannot have (exported bash functions) are left out.
    """
    exports = [
        f"export {name}={shlex.quote(value)}\n"
        for name, value in environment.items()
        if name.isidentifier() and name.isascii() and name not in ("PWD", "OLDPWD")
    ]
    return (
        "echo $$ >/run/ksmtrace.pid\n"
        + "".join(exports)
        + f"cd -- {shlex.quote(str(working_directory))} || cd /\n"
        + f"exec {shlex.join(command)}\n"
    )


def kernel_arguments(run: Path, options: VmOptions) -> str:
    """Return the kernel's command line."""
    arguments = [
        "console=ttyS0",
        # All warnings, nothing below: every character on the console takes emulated time.
        "quiet",
        "loglevel=5",
        # Any oops ends the guest, which -no-reboot turns into the end of QEMU.
        "panic=-1",
        "oops=panic",
        "mitigations=off",
        "random.trust_cpu=on",
        # virtme-ng's initramfs switches to this.
        f"init={run}/init",
    ]
    if options.hotplug_bytes:
        arguments.append("memhp_default_state=online_movable")
    return " ".join([*arguments, *options.append])


def qemu_command(
    kernel: Kernel,
    initramfs: Path,
    run: Path,
    ports: Ports,
    options: VmOptions,
    accelerator: Accelerator,
) -> list[str]:
    """Return the command that boots the guest; its console goes to ``run / "console"``."""
    memory_mib = options.memory_bytes // MIB
    memory = f"{memory_mib}M"
    if options.hotplug_bytes:
        memory += f",slots=1,maxmem={memory_mib + options.hotplug_bytes // MIB}M"
    command = [
        # If this program is killed, the guest goes too.
        *("setpriv", "--pdeathsig", "KILL"),
        *(qemu_program(), "-name", "ksmtrace-vm"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        # A guest is no business of the host's KSM.
        *("-machine", "q35,mem-merge=off"),
        # One thread: with more, emulated 7.3 oopsed on patched instructions.
        *("-accel", "tcg,thread=single" if accelerator == "tcg" else "kvm"),
        # QEMU 7.2 emulates AVX2 wrongly: numpy's argsort then leaves values out of order.
        *("-cpu", "max,-avx2" if accelerator == "tcg" else "host"),
        *("-m", memory, "-smp", str(options.cpus)),
        *_numa_arguments(options),
        *("-kernel", str(kernel.vmlinuz), "-initrd", str(initramfs)),
        *("-append", kernel_arguments(run, options)),
        *("-serial", f"file:{_option_value(run / 'console')}"),
        *_share(Path("/"), "/dev/root", "root", readonly=True),
        *("-device", "virtio-serial-pci"),
    ]
    for number, directory in enumerate(options.writable):
        command += _share(directory, f"writable{number}", f"writable{number}", readonly=False)
    for name, descriptor in (("out", ports.out), ("err", ports.err), ("control", ports.control)):
        command += ["-chardev", f"socket,id={name},fd={descriptor}"]
        command += ["-device", f"virtserialport,chardev={name},name=ksmtrace.{name}"]
    return command


def _numa_arguments(options: VmOptions) -> list[str]:
    arguments = []
    if options.numa_nodes > 1 or options.hotplug_bytes:
        nodes = options.numa_nodes
        # In MiB, because QEMU wants whole ones; the last node has the rest.
        share = options.memory_bytes // MIB // nodes
        for node in range(nodes):
            size = share if node < nodes - 1 else options.memory_bytes // MIB - share * (nodes - 1)
            cpus = [cpu for cpu in range(options.cpus) if cpu * nodes // options.cpus == node]
            arguments += ["-object", f"memory-backend-ram,id=node{node},size={size}M"]
            arguments += [
                "-numa",
                f"node,nodeid={node},memdev=node{node}" + "".join(f",cpus={cpu}" for cpu in cpus),
            ]
    if options.hotplug_bytes:
        size = options.hotplug_bytes // MIB
        arguments += ["-object", f"memory-backend-ram,id=hotplug,size={size}M"]
        arguments += ["-device", f"pc-dimm,memdev=hotplug,node={options.numa_nodes - 1}"]
    return arguments


def _share(directory: Path, tag: str, name: str, readonly: bool) -> list[str]:
    # multidevs: files of several host file systems must not share inode numbers in the guest.
    options = f"local,id={name},path={_option_value(directory)},security_model=none,multidevs=remap"
    return [
        *("-fsdev", options + (",readonly=on" if readonly else "")),
        *("-device", f"virtio-9p-pci,fsdev={name},mount_tag={tag}"),
    ]


def _option_value(path: Path) -> str:
    return str(path).replace(",", ",,")


def qemu_program() -> str:
    """Return QEMU's path."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise BackendUnavailable(
            "QEMU is not installed (qemu-system-x86_64)", "apt-get install qemu-system-x86"
        )
    return found


def make_initramfs(kernel: Kernel, target: Path) -> None:
    """Have virtme-ng write an initramfs that mounts this file system and starts the run's init.

    Only this part of virtme-ng is used: its guests pass the command's output on through ports
    whose names udev makes, which a container image does not have, and its QEMU outlives it.
    """
    program = shutil.which("virtme-run", path=Path(sys.executable).parent) or shutil.which(
        "virtme-run"
    )
    if program is None:
        raise BackendUnavailable("virtme-ng is not installed", "pip install virtme-ng")
    command = [
        *(program, "--kimg", str(kernel.vmlinuz), "--mods", "auto"),
        # Asks for the module that the guest's overlay needs.
        *("--overlay-rwdir", "/tmp", "--force-9p", "--force-initramfs"),
        *("--disable-kvm", "--disable-microvm", "--dry-run"),
        *("--save-initramfs", str(target)),
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if not target.exists():
        last = ((done.stderr + done.stdout).strip().splitlines() or ["no message"])[-1]
        missing = "busybox" in last
        raise BackendUnavailable(
            f"virtme-ng made no initramfs: {last}",
            "apt-get install busybox-static" if missing else "are kmod, file and zstd installed?",
        )


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def kvm_state() -> bool | None:
    """Return whether KVM works here, as an earlier guest of this boot found; None if unknown."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    try:
        known = json.loads((cache_directory() / "kvm.json").read_text())
    except (OSError, ValueError):
        return None
    return bool(known["usable"]) if known.get("boot_id") == _boot_id() else None


def remember_kvm(usable: bool, notify: Notify) -> None:
    """Keep what a guest has shown about KVM until this machine boots again."""
    path = cache_directory() / "kvm.json"
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        scratch.write_text(json.dumps({"boot_id": _boot_id(), "usable": usable}))
        scratch.rename(path)
    except OSError as error:
        notify(f"cannot keep what was found about KVM: {error.strerror}")
