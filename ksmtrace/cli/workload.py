"""``ksmtrace workload``: known workloads, and whether KSM did with them what it should."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ksmtrace.workload.outcome import Outcome, StepOutcome

_NAMES = ("duplicates", "unique", "volatile", "zero", "fork", "cow")

_EPILOG = """\b
NAME is one of
  duplicates  processes with many copies of few contents
              (--processes 3 --pages 1009 --contents 7)
  unique      pages that have no equal (--processes 2 --pages 1009)
  volatile    pages that change before every pass
              (--processes 2 --pages 503 --passes 5)
  zero        empty pages, with use_zero_pages (--processes 2 --pages 1009)
  fork        a process that forks once its pages are merged
              (--pages 1009 --contents 7 --forks 2)
  cow         writes to merged pages (--processes 2 --pages 503 --writes 101)

\b
Example: 5 processes with 1009 pages each in 3 contents, kept for a minute
  ksmtrace workload duplicates --processes 5 --contents 3 --hold 60
"""


@click.command(epilog=_EPILOG)
@click.argument("name", metavar="NAME", type=click.Choice(_NAMES))
@click.option("--processes", type=int, help="How many processes map pages.")
@click.option("--pages", type=int, help="Pages that each process maps.")
@click.option("--contents", type=int, help="Different contents among all these pages.")
@click.option("--passes", type=int, help="Passes of ksmd during which every page changes.")
@click.option("--forks", type=int, help="How many times the process forks.")
@click.option("--writes", type=int, help="Merged pages that are written to.")
@click.option(
    "--max-page-sharing", type=int, help="Set this knob for the run.  [default: as it is]"
)
@click.option("--smart-scan", is_flag=True, help="Leave smart_scan as it is; else it is off.")
@click.option(
    "--shared",
    is_flag=True,
    help="Run although other processes use KSM; global figures are then approximate.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Bound of each wait, in seconds.",
)
@click.option(
    "--hold",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Keep the end state, in seconds.",
)
@click.option(
    "--drain/--no-drain",
    default=True,
    show_default=True,
    help="Let ksmd forget the pages afterwards.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON object.")
def workload(
    name: str,
    max_page_sharing: int | None,
    smart_scan: bool,
    shared: bool,
    timeout: float,
    hold: float,
    drain: bool,
    as_json: bool,
    **given: int | None,
) -> None:
    """Make processes with known pages, and check what KSM does with them.

    Prints exactly what KSM should do, lets ksmd scan pass by pass, and compares the counters
    of the kernel and of each process. Every knob is saved first and restored on every way out.
    Needs root. Ends with status 1 where KSM did something else.
    """
    from ksmtrace.errors import WorkloadFailed
    from ksmtrace.workload.kinds import KINDS
    from ksmtrace.workload.run import Settings, run_workload

    def report(line: str) -> None:
        click.echo(f"{name}: {line}", err=True)

    def announce(lines: Sequence[str]) -> None:
        for line in lines:
            click.echo(line, err=as_json)

    def deliver(outcome: Outcome) -> None:
        click.echo(json.dumps(outcome.to_json()) if as_json else _text(outcome))
        sys.stdout.flush()

    outcome = run_workload(
        KINDS[name],
        {parameter: value for parameter, value in given.items() if value is not None},
        Settings(
            timeout_seconds=timeout,
            hold_seconds=hold,
            drain=drain,
            shared=shared,
            smart_scan=smart_scan,
            max_page_sharing=max_page_sharing,
        ),
        report,
        announce,
        deliver,
    )
    if not outcome.ok:
        last = outcome.steps[-1]
        reason = last.waited_for or "; ".join(last.differences(outcome.exact))
        raise WorkloadFailed(f"{name}, step {last.label}: {reason}")


def _text(outcome: Outcome) -> str:
    lines = []
    for step in outcome.steps:
        lines += ["", *_step_text(step, outcome.exact)]
    lines += ["", f"{outcome.name}: {'OK' if outcome.ok else 'MISMATCH'}"]
    return "\n".join(lines)


def _step_text(step: StepOutcome, exact: bool) -> list[str]:
    rows: list[tuple[str, str, str, str]] = []
    for name, expected in step.expected.items():
        observed = step.observed[name]
        verdict = _verdict(expected, observed) if exact else "not judged"
        rows.append((name, f"{expected:+d}", _number(observed, "+d"), verdict))
    for process in step.processes:
        for name, expected in process.expected.items():
            observed = process.observed[name]
            rows.append(
                (
                    f"{process.comm} ({process.pid}) {name}",
                    str(expected),
                    _number(observed, "d"),
                    _verdict(expected, observed),
                )
            )
    width = max(len(row[0]) for row in rows)
    passes = f"after {step.passes} pass{'es' * (step.passes != 1)}"
    head = f"{step.label}, {passes}"
    width = max(width, len(head))
    lines = [f"{head:<{width}}  {'expected':>9} {'observed':>9}"]
    lines += [f"{row[0]:<{width}}  {row[1]:>9} {row[2]:>9}  {row[3]}" for row in rows]
    return lines


def _number(value: int | None, form: str) -> str:
    return "absent" if value is None else format(value, form)


def _verdict(expected: int, observed: Any) -> str:
    if observed is None:
        return "not judged"
    return "OK" if observed == expected else "MISMATCH"
