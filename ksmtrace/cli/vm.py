"""``ksmtrace vm``."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from ksmtrace.cli.options import Size
from ksmtrace.errors import LostVM, UsageError


@click.group()
def vm() -> None:
    """Run commands in throw-away guests with other kernels.

    \b
    Example:
      ksmtrace vm run --kernel 6.12 -- uname -r
    """


@vm.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "-k",
    "--kernel",
    "what",
    metavar="WHAT",
    required=True,
    help="A Debian series (5.10, 6.1, 6.12, 6.18, ...; 7.x is the newest 7), the release of a "
    "Debian kernel, or a bzImage.",
)
@click.option(
    "--modules",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The modules of that bzImage, where they are not found above it.",
)
@click.option("-m", "--memory", type=Size(default_unit="M"), default="2G", show_default=True)
@click.option("--cpus", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option(
    "--numa",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="NUMA nodes, which share memory and CPUs evenly.",
)
@click.option(
    "--swap", type=Size(default_unit="M"), default="0", help="Swap on compressed memory (zram)."
)
@click.option(
    "--hotplug",
    type=Size(default_unit="M"),
    default="0",
    help="Further memory that can be offlined.",
)
@click.option(
    "-w",
    "--writable",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A directory that CMD really writes to. Repeatable.",
)
@click.option("--append", multiple=True, help="A further kernel argument. Repeatable.")
@click.option("-t", "--timeout", type=click.FloatRange(min=0), help="End CMD after these seconds.")
@click.option(
    "--accel",
    type=click.Choice(["kvm", "tcg"]),
    help="Virtualize or emulate; default: KVM where a guest has booted with it.",
)
@click.option("-q", "--quiet", is_flag=True, help="Do not say what takes time.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    what: str,
    modules: Path | None,
    memory: int,
    cpus: int,
    numa: int,
    swap: int,
    hotplug: int,
    writable: tuple[Path, ...],
    append: tuple[str, ...],
    timeout: float | None,
    accel: str | None,
    quiet: bool,
    command: tuple[str, ...],
) -> int:
    """Run CMD as root in a guest with that kernel, over this file system.

    The guest is made for CMD and thrown away with all it writes, except below directories given
    with --writable. CMD's output, exit status and Ctrl-C are passed through; it has no input and no
    network. Kernels of Debian series are fetched once and kept below XDG_CACHE_HOME.

    \b
    Exit status: CMD's own (255 becomes 254), 128 + N after signal N; 124 CMD took longer than
    --timeout; 255 the guest is lost: its kernel panicked, oopsed or hung, or never booted;
    2 wrong usage; 3 cannot run here.

    \b
    Example:
      ksmtrace vm run --kernel 7.x -- ksmtrace doctor
      ksmtrace vm run --kernel 6.12 -w . -- ksmtrace record -d 5 -o x.ksmt
    """
    if shutil.which(command[0]) is None:
        raise UsageError(f"the command {command[0]!r} is not found", "give it after `--`")
    from ksmtrace.vm import VmOptions, find_kernel, run_in_vm
    from ksmtrace.vm.machine import qemu_program

    def notify(text: str) -> None:
        if not quiet:
            click.echo(f"ksmtrace: {text}", err=True)

    options = VmOptions(
        memory_bytes=memory,
        cpus=cpus,
        numa_nodes=numa,
        swap_bytes=swap,
        hotplug_bytes=hotplug,
        writable=writable,
        append=append,
        accelerator="kvm" if accel == "kvm" else "tcg" if accel == "tcg" else None,
    )
    # Before a kernel is fetched that nothing could boot.
    qemu_program()
    kernel = find_kernel(what, modules, notify)
    try:
        result = run_in_vm(
            command, kernel, options, timeout_s=timeout, pass_signals=True, notify=notify
        )
    except LostVM as lost:
        for line in lost.console_tail:
            click.echo(f"  | {line}", err=True)
        raise
    if result.exit_status == 124 and result.outcome.value == "timed out":
        notify(f"the command was ended after {timeout:g} s")
    return result.exit_status
