"""``ksmtrace selftest``."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksmtrace.cli.options import Seconds
from ksmtrace.errors import CannotRun, LostVM, RecordingError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ksmtrace.claims.claim import Case

_SKIPPED = 4
_KSMTRACE = [sys.executable, "-P", "-c", "from ksmtrace.cli import main; main()"]
_GUEST_MEMORY_BYTES = 1 << 30
_GUEST_SWAP_BYTES = 256 << 20
_GUEST_HOTPLUG_BYTES = 128 << 20
_GUEST_TIMEOUT_S = 1800.0
# From a guest whose kernel cannot be recorded, what it has judged itself, or why nothing was done.
_OUTCOME = "outcome.json"


@click.command()
@click.option(
    "-k",
    "--kernel",
    "kernels",
    metavar="WHAT",
    multiple=True,
    help="Test this kernel in a guest, not the running one: a Debian series (5.10, 6.1, 6.12, "
    "7.x, ...), the release of a Debian kernel, or a bzImage. Repeatable.",
)
@click.option(
    "--modules",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The modules of that bzImage, where they are not found above it.",
)
@click.option("--claim", "ids", metavar="ID", multiple=True, help="Only this claim. Repeatable.")
@click.option(
    "--timeout",
    type=Seconds(min=1),
    default=60.0,
    show_default=True,
    help="Bound of each wait, in seconds.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the recording and what the workloads read in this folder.",
)
@click.option("--perform", "perform_in", type=click.Path(path_type=Path), hidden=True)
@click.option("-a", "--all", "show_all", is_flag=True, help="Also what holds and what is unknown.")
@click.option("--json", "as_json", is_flag=True, help="The judgements as JSON on stdout.")
@click.option("--ktap", is_flag=True, help="The judgements as KTAP on stdout.")
def selftest(
    kernels: tuple[str, ...],
    modules: Path | None,
    ids: tuple[str, ...],
    timeout: float,
    save: Path | None,
    perform_in: Path | None,
    show_all: bool,
    as_json: bool,
    ktap: bool,
) -> int:
    """Exercise KSM with known workloads, and judge every claim about it.

    Merges, writes, forks, unmerges and ends processes with known pages while all of it is
    recorded. Every knob is saved first and restored on every way out. Needs root, and nobody else
    who uses KSM, as their pages could not be told from ours. In cgroups of its own, where there
    are any, its processes are swapped out, and one is killed for want of memory.

    \b
    Exit status: 0 fine; 1 a claim is violated, or a kernel could not be tested to the end; 2 wrong
    usage; 4 skipped as a whole: nothing could be tested here.

    \b
    Example:
      ksmtrace selftest                                     the running kernel
      ksmtrace selftest --kernel 6.12 --kernel 7.x --ktap   two guests
      ksmtrace selftest --kernel arch/x86/boot/bzImage      a kernel just built
    """
    from ksmtrace.claims.judgement import nr_faults
    from ksmtrace.claims.ktap import check_lines, skip_all_line
    from ksmtrace.claims.table import choose
    from ksmtrace.cli.check import outcome_lines

    if as_json and ktap:
        raise UsageError("--json and --ktap exclude each other", "give one of them")
    choose(ids)
    stopped: list[int] = []

    def stop(number: int, frame: object = None) -> None:
        stopped.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, stop)
    if perform_in is not None:
        return _perform_only(ids, timeout, perform_in)
    if save is not None and len(kernels) > 1:
        raise UsageError("--save is for one kernel")
    outcomes = [_in_guest(what, modules, ids, timeout, save) for what in kernels] or [
        _here(ids, timeout, save)
    ]
    # Native code that runs at that moment, as of a module being imported, may swallow it.
    if stopped:
        stop(stopped[0])
    tested = [outcome for outcome in outcomes if "claims" in outcome]
    failed = [outcome for outcome in outcomes if "failed" in outcome]
    skipped = [outcome for outcome in outcomes if "skipped" in outcome]
    if as_json:
        click.echo(json.dumps({"kernels": outcomes}))
    elif ktap and not tested and not failed:
        for line in skip_all_line(skipped[0]["skipped"]):
            click.echo(line)
    elif ktap:
        for line in check_lines(outcomes):
            click.echo(line)
    else:
        for outcome in tested:
            for line in outcome_lines(outcome, show_all or bool(ids)):
                click.echo(line)
        for outcome in failed:
            click.echo(f"{outcome['file']}: FAILED: {outcome['failed']}")
        for outcome in skipped:
            click.echo(f"{outcome['file']}: SKIPPED: {outcome['skipped']}")
    if failed or any(nr_faults(outcome["claims"]) for outcome in tested):
        return 1
    return 0 if tested else _SKIPPED


def _here(ids: tuple[str, ...], timeout: float, save: Path | None) -> dict[str, Any]:
    from ksmtrace.claims.live import read_case
    from ksmtrace.claims.selftest import folder_for, perform, trials_for
    from ksmtrace.claims.table import choose

    head = {"file": "the running kernel"}
    try:
        with folder_for(save) as folder:
            perform(trials_for(choose(ids)), timeout, folder, _report)
            return {**head, **_judged(folder, ids, read_case)}
    except CannotRun as error:
        reason = f"{error} ({error.hint})" if error.hint else str(error)
        return {**head, "kernel": None, "skipped": reason}


def _judged(
    folder: Path, ids: tuple[str, ...], state: Callable[[], Case] | None = None
) -> dict[str, Any]:
    from ksmtrace.claims.judgement import as_json, judge_all
    from ksmtrace.claims.selftest import read_performed
    from ksmtrace.claims.table import choose

    case = read_performed(folder, state)
    return as_json(judge_all(choose(ids), case), case)


def _in_guest(
    what: str, modules: Path | None, ids: tuple[str, ...], timeout: float, save: Path | None
) -> dict[str, Any]:
    """Let a guest carry out the trials; they are judged here."""
    from ksmtrace.claims.selftest import folder_for
    from ksmtrace.vm import Outcome, VmOptions, find_kernel, run_in_vm
    from ksmtrace.vm.machine import qemu_program

    head: dict[str, Any] = {"file": what, "kernel": {"release": what}}
    chosen = [part for claim_id in ids for part in ("--claim", claim_id)]
    try:
        qemu_program()
        kernel = find_kernel(what, modules, _report)
        _report(f"{what}: in a guest, at most {_GUEST_TIMEOUT_S:g} s")
        with folder_for(save) as folder:
            options = ["--perform", str(folder), "--timeout", str(timeout), *chosen]
            try:
                result = run_in_vm(
                    [*_KSMTRACE, "selftest", *options],
                    kernel,
                    VmOptions(
                        memory_bytes=_GUEST_MEMORY_BYTES,
                        numa_nodes=2,
                        swap_bytes=_GUEST_SWAP_BYTES,
                        # What cannot be judged without is unknown then.
                        needs_swap=False,
                        hotplug_bytes=_GUEST_HOTPLUG_BYTES,
                        writable=[folder],
                    ),
                    timeout_s=_GUEST_TIMEOUT_S,
                    pass_signals=True,
                    notify=_report,
                )
            except LostVM as lost:
                for line in lost.console_tail:
                    click.echo(f"  | {line}", err=True)
                return {**head, **_judged_until_then(folder, ids), "failed": _why_lost(lost)}
            if (folder / _OUTCOME).exists():
                return {**head, **json.loads((folder / _OUTCOME).read_text())}
            if result.exit_status == 0:
                return {**head, **_judged(folder, ids)}
            failed = f"the trials ended with status {result.exit_status}, see above"
            if result.outcome is Outcome.TIMED_OUT:
                failed = f"the trials were ended after {_GUEST_TIMEOUT_S:g} s"
            return {**head, **_judged_until_then(folder, ids), "failed": failed}
    except CannotRun as error:
        return {**head, "skipped": f"{error} ({error.hint})" if error.hint else str(error)}


def _judged_until_then(folder: Path, ids: tuple[str, ...]) -> dict[str, Any]:
    # A fault may have shown before it took the kernel down.
    try:
        return _judged(folder, ids)
    except RecordingError as error:
        _report(f"nothing can be judged of what was recorded until then: {error}")
        return {}


def _why_lost(lost: LostVM) -> str:
    if not lost.has_booted:
        return f"{lost}: {lost.hint}"
    # Without the console's time stamp.
    where = next((line[line.index("RIP: ") :] for line in lost.console_tail if "RIP: " in line), "")
    return f"{lost} ({where.strip()})" if where else str(lost)


def _perform_only(ids: tuple[str, ...], timeout: float, folder: Path) -> int:
    from ksmtrace.claims.live import read_case
    from ksmtrace.claims.selftest import perform, trials_for
    from ksmtrace.claims.table import choose

    (folder / _OUTCOME).unlink(missing_ok=True)
    try:
        if perform(trials_for(choose(ids)), timeout, folder, _report):
            return 0
        outcome = _judged(folder, ids, read_case)
    except CannotRun as error:
        outcome = {"skipped": f"{error} ({error.hint})" if error.hint else str(error)}
    (folder / _OUTCOME).write_text(json.dumps(outcome))
    return 0


def _report(line: str) -> None:
    click.echo(f"selftest: {line}", err=True)
