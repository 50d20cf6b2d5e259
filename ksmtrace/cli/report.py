"""``ksmtrace report``: the report as text for people, or as JSON."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksmtrace.cli.sections import SECTIONS
from ksmtrace.cli.sections.words import name_of
from ksmtrace.cli.table import printable
from ksmtrace.cli.times import Time, moment_ns
from ksmtrace.errors import UsageError
from ksmtrace.units import text_duration, text_signal

if TYPE_CHECKING:
    from ksmtrace.analysis.recorded import Recorded


@click.command()
@click.argument("file", type=click.Path(path_type=Path, readable=False))
@click.option("--json", "as_json", is_flag=True, help="Everything, exactly, as one JSON object.")
@click.option("--all", "everything", is_flag=True, help="All passes, processes and counters.")
@click.option(
    "--section",
    "names",
    multiple=True,
    type=click.Choice([section.name for section in SECTIONS]),
    metavar="NAME",
    help="Only this section; may be given again. One of "
    f"{', '.join(section.name for section in SECTIONS)}.",
)
@click.option(
    "--pid",
    "pids",
    multiple=True,
    type=click.IntRange(min=1),
    help="Only what concerns this process; may be given again.",
)
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Write a page with plots to OUT instead: one file that needs no network and no script.",
)
@click.option("-f", "--force", is_flag=True, help="Overwrite OUT.")
@click.option("--since", type=Time(), help="Leave out what was before: seconds as tree --at.")
@click.option("--until", type=Time(), help="Leave out what was then, and after.")
def report(
    file: Path,
    as_json: bool,
    everything: bool,
    names: tuple[str, ...],
    pids: tuple[int, ...],
    since: float | None,
    until: float | None,
    page: Path | None,
    force: bool,
) -> None:
    """Report what a recording holds: first whether it is complete, then what KSM did.

    A time is in seconds since the recording began; -N: before its end.

    \b
    Example:
      ksmtrace report host.ksmt
      ksmtrace report host.ksmt --section merges --section processes
      ksmtrace report host.ksmt --since 60 --until 90.5 --pid 1234
      ksmtrace report host.ksmt --json | jq .merges
      ksmtrace report host.ksmt --html host.html
    """
    from ksmtrace.analysis.recorded import gather
    from ksmtrace.analysis.report import TOPICS, make_report
    from ksmtrace.cli.waiting import Waiting
    from ksmtrace.recording.reader import RecordingReader

    if page is not None and as_json:
        raise UsageError("--html and --json ask for two reports", "give one of them")
    # Unlike Path.exists(), these raise nothing where a directory may not be searched.
    if page is not None and all(map(os.path.exists, (page, file))) and page.samefile(file):
        raise UsageError(f"{page} is the recording itself", "choose another name")
    sections = [section for section in SECTIONS if not names or section.name in names]
    with Waiting(f"reading {file}") as waiting:
        recorded = gather(RecordingReader(file))
        waiting.show("making the report")
        content = make_report(_select(file, recorded, pids, since, until))
    if as_json:
        asked = {key for section in sections for key in section.keys}
        unasked = TOPICS.keys() - asked if names else ()
        click.echo(json.dumps({k: v for k, v in content.items() if k not in unasked}))
        return
    heading = list(_heading(file, content))
    if page is not None:
        from ksmtrace.cli.page import make_page
        from ksmtrace.recording.output import write_new

        text = make_page(file, heading, content, sections, everything)
        write_new(page, text.encode(errors="replace"), force)
        return
    for line in heading:
        click.echo(line)
    for section in sections:
        click.echo()
        for line in section.text(content, everything):
            click.echo(line)


def _select(
    file: Path,
    recorded: Recorded,
    pids: tuple[int, ...],
    since: float | None,
    until: float | None,
) -> Recorded:
    from ksmtrace.analysis.processes import find_processes
    from ksmtrace.analysis.selection import between, of_pids

    unknown = set(pids) - {process.pid for process in find_processes(recorded)} if pids else ()
    if unknown:
        raise UsageError(
            f"{file} tells nothing of process {', '.join(map(str, sorted(unknown)))}",
            "--section processes lists those that KSM dealt with",
        )
    if since is not None or until is not None:
        edges = (recorded.begin_ns(), recorded.end_ns())
        begin_ns, end_ns = (
            None if time_s is None else moment_ns(file, time_s, *edges) for time_s in (since, until)
        )
        try:
            recorded = between(recorded, begin_ns, end_ns)
        except ValueError:
            raise UsageError("nothing is between --since and --until", "leave one out") from None
    return of_pids(recorded, pids) if pids else recorded


def _heading(file: Path, content: dict[str, Any]) -> Iterator[str]:
    started = time.localtime(content["started_realtime_ns"] // 1_000_000_000)
    yield (
        f"{file}: Linux {content['kernel']['release']}, {text_duration(content['duration_ns'])} "
        f"from {time.strftime('%Y-%m-%d %H:%M:%S', started)}"
    )
    yield f"Recorded by: {printable(shlex.join(content['command_line']))}"
    if content["selection"]:
        yield from _selected(content)
    total = sum(count or 0 for count in content["events"].values())
    if content["complete"]:
        because = content["ended_because"]
        ended = "" if because is None else f"; ended because: {because}"
        yield f"COMPLETE: {total:,} events, none lost{ended}"
        if content["cut_off"]:
            yield f"  - the recording itself is INCOMPLETE: {content['cut_off']}"
    else:
        at_most = "up to " if content["selection"] and content["lost"] else ""
        yield f"INCOMPLETE: {total:,} events, {at_most}{content['lost']:,} lost"
        for reason in content["incomplete_because"]:
            yield f"  - {reason}"
    status = content["command_exit_status"]
    if status and status < 0:
        yield f"The recorded command was ended by {text_signal(-status)}"
    elif status:
        yield f"The recorded command failed: exit status {status}"


def _selected(content: dict[str, Any]) -> Iterator[str]:
    selection = content["selection"]

    def span(what: str) -> str | None:
        begin_ns, end_ns = selection[f"{what}begin_ns"], selection[f"{what}end_ns"]
        if begin_ns is None or end_ns is None:
            return None
        begin_s, end_s = ((ns - content["started_ns"]) / 1e9 for ns in (begin_ns, end_ns))
        return f"{begin_s:.3f} s to {end_s:.3f} s"

    whose = ""
    if selection["pids"] is not None:
        whose = f", and of it what concerns {_processes(selection['pids'], content)}"
    yield f"SELECTED: {span('')}{whose}"
    samples, tallies = span("samples_"), span("tallies_")
    yield (
        f"  the kernel's counters: {samples or 'no sample in the span'}; the kernel side's counts: "
        f"{tallies or 'none read in the span'}"
    )


def _processes(pids: list[int], content: dict[str, Any]) -> str:
    names = {process["pid"]: name_of(process) for process in content["processes"]}
    return ", ".join(f"{names[pid]} ({pid})" if pid in names else str(pid) for pid in pids)
