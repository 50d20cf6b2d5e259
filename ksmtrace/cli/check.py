"""``ksmtrace check``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import click

from ksmtrace.errors import UsageError
from ksmtrace.units import text_duration


@click.command()
@click.argument("file", type=click.Path(path_type=Path, readable=False), required=False)
@click.option("--claim", "ids", metavar="ID", multiple=True, help="Only this claim. Repeatable.")
@click.option("--list", "list_only", is_flag=True, help="List the claims, and judge none.")
@click.option("-a", "--all", "show_all", is_flag=True, help="Also what holds and what is unknown.")
@click.option("--json", "as_json", is_flag=True, help="The judgements as JSON on stdout.")
@click.option("--ktap", is_flag=True, help="The judgements as KTAP on stdout.")
def check(
    file: Path | None,
    ids: tuple[str, ...],
    list_only: bool,
    show_all: bool,
    as_json: bool,
    ktap: bool,
) -> int:
    """Judge what has been said about KSM, on a recording FILE or on the running kernel.

    Without FILE the running kernel is judged as it stands: counters, kernel memory and mapped pages
    are read, and nothing is touched. A recording made with --every-page and --witnesses tells
    most. A folder that `ksmtrace selftest --save` made is judged as it was then. A claim that the
    kernel is known to refute, such as a sentence of the documentation that the code does not
    follow, is shown as refuted and is no fault.

    \b
    Exit status: 0 fine; 1 a claim is violated; 2 wrong usage; 3 cannot run here; 5 unreadable
    recording.

    \b
    Example:
      ksmtrace check                        the running kernel
      ksmtrace record --every-page --witnesses -o x.ksmt -d 60
      ksmtrace check x.ksmt                 what was recorded
      ksmtrace check x.ksmt --claim C56     one claim
    """
    from ksmtrace.claims.judgement import as_json as judgements_json
    from ksmtrace.claims.judgement import judge_all, nr_faults
    from ksmtrace.claims.ktap import check_lines
    from ksmtrace.claims.table import choose
    from ksmtrace.cli.waiting import Waiting

    if as_json and ktap:
        raise UsageError("--json and --ktap exclude each other", "give one of them")
    claims = choose(ids)
    if list_only:
        if file is not None or as_json or ktap:
            raise UsageError("--list judges nothing", "leave FILE, --json and --ktap out")
        for claim in claims:
            click.echo(f"{', '.join(claim.ids)}: {claim.statement}")
        return 0
    if file is None:
        from ksmtrace.claims.live import read_case

        case = read_case()
    # Path.is_dir() raises where a directory above may not be searched.
    elif os.path.isdir(file):  # noqa: PTH112
        from ksmtrace.claims.selftest import read_performed

        case = read_performed(file)
    else:
        from ksmtrace.analysis.recorded import gather
        from ksmtrace.claims.claim import Case
        from ksmtrace.recording.reader import RecordingReader

        with Waiting(f"reading {file}"):
            case = Case(gather(RecordingReader(file)))
    with Waiting("judging"):
        outcome = judgements_json(judge_all(claims, case), case)
    outcome = {"file": None if file is None else str(file), **outcome}
    if as_json:
        click.echo(json.dumps(outcome))
    elif ktap:
        for line in check_lines([outcome]):
            click.echo(line)
    else:
        for line in outcome_lines(outcome, show_all or bool(ids)):
            click.echo(line)
    return 1 if nr_faults(outcome["claims"]) else 0


def outcome_lines(outcome: Mapping[str, Any], show_all: bool) -> Iterator[str]:
    """Write the judgements for people, the worst first."""
    kernel = (outcome["kernel"] or {}).get("release", "unknown kernel")
    counts = outcome["counts"]
    claims = outcome["claims"]
    faults = [c for c in claims if c["verdict"] == "violated" and c["expected"] is None]
    refuted = [c for c in claims if c["verdict"] == "violated" and c["expected"] is not None]
    yield f"{outcome.get('file') or 'the running kernel'}: Linux {kernel}"
    yield (
        f"{'VIOLATED ' + str(len(faults)) if faults else 'nothing violated'}; "
        f"{counts['holds']} hold, {len(refuted)} refuted as known, {counts['unknown']} unknown, "
        f"{counts['not_applicable']} not applicable"
    )
    for reason in outcome["incomplete"]:
        yield f"  the recording is incomplete: {reason}"
    for claim in faults:
        yield ""
        yield f"VIOLATED {_head(claim)}"
        yield from _details(claim)
    for title, chosen in (
        ("REFUTED, AS KNOWN", refuted),
        ("UNKNOWN", [c for c in claims if c["verdict"] == "unknown"]),
        ("HOLDS", [c for c in claims if c["verdict"] == "holds"] if show_all else []),
        ("NOT APPLICABLE", [c for c in claims if c["verdict"] == "not_applicable"])
        if show_all
        else ("", []),
    ):
        if chosen:
            yield ""
            yield title
        for claim in chosen if show_all or title != "UNKNOWN" else []:
            yield f"  {_head(claim)}"
            yield from (f"  {line}" for line in _details(claim))
        if title == "UNKNOWN" and not show_all:
            yield from _by_reason(chosen)


def _head(claim: Mapping[str, Any]) -> str:
    return f"{claim['id']}: {claim['statement']}"


def _details(claim: Mapping[str, Any]) -> Iterator[str]:
    if claim["defined"]:
        yield f"    code defines: {claim['defined']}"
    if claim["observed"]:
        yield f"    observed: {claim['observed']}"
    if claim["expected"]:
        yield f"    known: {claim['expected']}"
    if claim["reason"]:
        yield f"    {claim['reason']}"
    for evidence in claim["evidence"]:
        at = "" if evidence["at_ns"] is None else f" at {text_duration(evidence['at_ns'])}"
        yield f"    {evidence['source']}{at}: {evidence['says']}"
    yield f"    source: {claim['source']}"


def _by_reason(claims: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    # One line per reason: at 3 a.m. the same sentence is read once.
    for reason in dict.fromkeys(claim["reason"] for claim in claims):
        ids = ", ".join(claim["id"] for claim in claims if claim["reason"] == reason)
        yield f"  {ids}: {shorten(reason, 150, placeholder=' ...')}"
