"""``ksmtrace top``: the terminal UI, over the running kernel or a recording."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ksmtrace.cli.options import Seconds, Size, without_option
from ksmtrace.errors import CannotRun, PrivilegeMissing, UsageError
from ksmtrace.units import text_bytes

if TYPE_CHECKING:
    from ksmtrace.stream import CounterSample
    from ksmtrace.tui.engine import Engine
    from ksmtrace.tui.live import Capturing
    from ksmtrace.tui.moment import PageSavings


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path, readable=False))
@click.option("--end", "at_end", is_flag=True, help="Show FILE as it ends, and do not play it.")
@click.option(
    "--interval",
    type=Seconds(min=0.05),
    default=1.0,
    show_default=True,
    help="Seconds between samples of the kernel's counters.",
)
@click.option(
    "--ring", type=Size(), default="16M", show_default=True, help="Size of the event ring."
)
@without_option
def top(
    file: Path | None, at_end: bool, interval: float, ring: int, without: tuple[str, ...]
) -> int:
    """Show what KSM does, as it does it; or replay a recording.

    Nothing about KSM is changed, unless you change a knob and confirm it. ? shows the keys.

    \b
    Example:
      ksmtrace top
      ksmtrace top host.ksmt
    """
    engine: Engine
    if file is not None:
        from ksmtrace.tui.replay import ReplayEngine

        engine = ReplayEngine(file, at_end)
    else:
        if at_end:
            raise UsageError("the running kernel has no end", "give a recording with --end")
        engine = _live(interval, ring, without)
    _check_terminal()
    from ksmtrace.tui.apart import EngineApart

    # Forks, and so comes before all that may begin a thread.
    engine = EngineApart(engine)
    from ksmtrace.tui.app import Top

    app = Top(engine)
    try:
        status = app.run()
    finally:
        engine.stop()
        engine.join()
    if engine.crashed is not None:
        raise engine.crashed
    _say_goodbye(app.changed, engine)
    if engine.failure is not None:
        raise engine.failure
    return status if status is not None else app.return_code or 0


def _check_terminal() -> None:
    # textual draws on stderr.
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise CannotRun(
            "top needs a terminal",
            "without one, `ksmtrace record` and `ksmtrace report` tell the same",
        )
    if os.environ.get("TERM", "dumb") == "dumb":
        raise CannotRun("this terminal cannot move its cursor (TERM is dumb)", "set TERM")


def _live(interval: float, ring: int, without: tuple[str, ...]) -> Engine:
    from ksmtrace.kernel import sysfs
    from ksmtrace.kernel.privileges import read_privileges
    from ksmtrace.tui.live import LiveEngine

    sysfs.read_ksm()
    if not read_privileges().may_trace:
        raise PrivilegeMissing("tracing programs may not be loaded by this user", "run as root")

    def open_capture(until: Callable[[], str | None]) -> Capturing:
        from ksmtrace.capture.plan import make_plan
        from ksmtrace.capture.session import Capture, CaptureSettings
        from ksmtrace.capture.sites import find_recipe
        from ksmtrace.events import check_sorting
        from ksmtrace.kernel.facts import read_facts

        check_sorting()
        facts = read_facts()
        plan = make_plan(facts, find_recipe(facts.kernel.build_id), without=without)
        return Capture(facts, plan, CaptureSettings(ring, int(interval * 1e9)), until)

    return LiveEngine(open_capture, _read_early, _read_savings)


def _read_early() -> CounterSample:
    from ksmtrace.capture.samples import CounterSampler

    return CounterSampler(None).sample()


def _read_savings() -> PageSavings:
    import time

    from ksmtrace.kernel.page_truth import read_page_truth
    from ksmtrace.tui.moment import PageSavings

    truth = read_page_truth()
    frames = truth.merged_frames()
    return PageSavings(
        time.monotonic_ns(),
        frames=len(frames),
        places=int(frames["nr_pages"].sum()),
        trusted=truth.kpf_ksm.truthful is True,
    )


def _say_goodbye(changed: dict[str, str], engine: Engine) -> None:
    recorder = engine.shown.recorder
    if recorder is not None and recorder.nr_events:
        click.echo(
            f"{recorder.path}: {recorder.nr_events:,} events, {text_bytes(recorder.written_bytes)}",
            err=True,
        )
    for name, before in changed.items():
        click.echo(f"ksmtrace: /sys/kernel/mm/ksm/{name} was changed, it was {before}", err=True)
