"""What became of pages, and why merges failed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Bars, Chart, Panel, Series, Timeline
from ksmtrace.cli.sections.words import MOST_ROWS, seconds
from ksmtrace.cli.table import indent, printable, render_table, wrap
from ksmtrace.units import text_share
from ksmtrace.words import PAGE_OUTCOMES

_MOST_PASSES = 8
_MOST_PASSES_DRAWN = 500
_MOST_PANELS = 6
_MOST_SERIES = 5
_MOST_IN_A_ROW = 4


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    outcomes = content["outcomes"]
    if outcomes["pages"] is None:
        yield "OUTCOMES: what becomes of pages that no merge is tried of is not visible"
        yield from wrap(outcomes["pages_unknown_because"], "  ", "  ")
        yield from _counted(outcomes["counted"])
    else:
        yield from _pages(outcomes, everything)
    if outcomes["causes"] is None:
        yield "  why merges fail is not visible on this kernel"
        return
    yield from _causes(outcomes, everything)


def _counted(counted: dict[str, int | None] | None) -> Iterator[str]:
    """Say what the counters tell all the same."""
    known = {
        f"{name}ped" if name == "skip" else name: count
        for name, key in (("scanned", "scanned_pages"), ("skip", "skipped_pages"))
        if counted and (count := counted[key]) is not None
    }
    if known:
        said = ", ".join(f"{name} {count:,}" for name, count in known.items())
        yield f"  by the kernel's counters, all processes together: {said} pages"


def _pages(outcomes: dict[str, Any], everything: bool) -> Iterator[str]:
    pages = outcomes["pages"]
    total = sum(pages["total"].values())
    derived = outcomes["page_rungs"]["cmp_and_merge_page"] == "derived"
    yield (
        f"OUTCOMES: ksmd came by {total:,} pages, and looked at {pages['visited_pages']:,} of them"
        + ("  (derived from the functions that it calls)" if derived else "")
    )
    if not total:
        return
    if pages["not_told_pages"]:
        yield (
            f"  {pages['not_told_pages']:,} more were looked at, of which no event tells: lost, or "
            "ksmd had not gone on when the recording ended"
        )
    ranked = sorted(pages["total"].items(), key=lambda item: -item[1])
    rows = [[PAGE_OUTCOMES[n][0], f"{count:,}", text_share(count / total), PAGE_OUTCOMES[n][1]]
            for n, count in ranked]  # fmt: skip
    yield from indent(render_table(["outcome", "pages", "share", ""], rows, left=(0, 3)))
    if outcomes["skips"]:
        said = ", ".join(
            f"{row['pages']:,} in {row['remaining_skips']}" for row in outcomes["skips"]
        )
        yield from wrap(
            f"skipped pages by the next passes that will skip them: {said}", "  ", "    "
        )
    shown = pages["passes"] if everything else pages["passes"][-_MOST_PASSES:]
    if len(shown) < len(pages["passes"]):
        yield f"  the last {len(shown)} of {len(pages['passes'])} passes (--all shows all):"
    rows = [
        ["–" if row["seq"] is None else str(row["seq"]), *_sum_and_most(row["outcomes"])]
        for row in shown
    ]
    yield from indent(render_table(["seqnr", "pages", "most of them"], rows, left=(2,)))
    processes = pages["by_pid"] if everything else pages["by_pid"][:MOST_ROWS]
    rows = [
        [
            "–" if row["pid"] is None else str(row["pid"]),
            row["comm"] or "unknown",
            *_sum_and_most(row["outcomes"]),
        ]
        for row in processes
    ]
    yield from indent(render_table(["pid", "who", "pages", "most of them"], rows, left=(1, 3)))
    if len(processes) < len(pages["by_pid"]):
        yield f"  {len(pages['by_pid']) - len(processes)} more processes with --all"


def _sum_and_most(outcomes: dict[str, int]) -> tuple[str, str]:
    ranked = sorted(outcomes.items(), key=lambda item: -item[1])
    said = [f"{PAGE_OUTCOMES[name][0]} {count:,}" for name, count in ranked[:_MOST_IN_A_ROW]]
    rest = sum(count for _, count in ranked[_MOST_IN_A_ROW:])
    return f"{sum(outcomes.values()):,}", ", ".join([*said, *[f"others {rest:,}"] * bool(rest)])


def _causes(outcomes: dict[str, Any], everything: bool) -> Iterator[str]:
    causes = outcomes["causes"]
    if not causes:
        yield "  no merge failed"
        return
    total = sum(row["failures"] for row in causes)
    yield f"  {total:,} merges failed" + (
        "  (derived: causes are inferred from what was there afterwards)"
        if outcomes["rung"] == "derived"
        else ""
    )
    counts = [
        [
            row["cause"],
            f"{row['failures']:,}",
            text_share(row["failures"] / total),
            f"{row['seen']:,}",
            f"{row['inferred']:,}",
        ]
        for row in causes
    ]
    heads = ["cause", "failures", "share", "seen", "inferred"]
    yield from indent(render_table(heads, counts, left=(0,)))
    for row in causes:
        yield from wrap(f"{row['cause']}: {row['meaning']}", "  ", "    ")
        yield from wrap(f"what to do: {row['advice']}", "    ", "    ")
    processes = outcomes["causes_by_pid"]
    shown = processes if everything else processes[:MOST_ROWS]
    rows = [
        [str(row["pid"]), row["comm"] or "unknown", row["cause"], f"{row['failures']:,}"]
        for row in shown
    ]
    heads = ["pid", "who", "cause", "failures"]
    yield from indent(render_table(heads, rows, left=(1, 2)))
    if len(shown) < len(processes):
        yield f"  {len(processes) - len(shown)} more rows with --all"


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield what became of pages, in all and pass by pass, and why merges failed."""
    outcomes = content["outcomes"]
    pages, causes = outcomes["pages"], outcomes["causes"]
    title = "What became of the pages that ksmd came by"
    if pages is None:
        yield Absent(title, f"that is not visible: {outcomes['pages_unknown_because']}")
    elif not pages["total"]:
        yield Absent(title, "it came by none")
    else:
        ranked = sorted(pages["total"], key=lambda name: -pages["total"][name])
        counts = Series("pages", [pages["total"][name] for name in ranked])
        yield Bars(title, "pages", [PAGE_OUTCOMES[name][0] for name in ranked], (counts,))
        yield from _over_time(content, ranked)
        yield _by_process(pages["by_pid"][:MOST_ROWS], ranked)
    title = "Why merges failed"
    if causes is None:
        yield Absent(title, "that is not visible on this kernel")
    elif not causes:
        yield Absent(title, "none failed")
    else:
        unknown = [row["failures"] - row["seen"] - row["inferred"] for row in causes]
        series = [Series(how, [row[how] for row in causes]) for how in ("seen", "inferred")]
        series += [Series("unknown", unknown)] * any(unknown)
        yield Bars(title, "failures", [row["cause"] for row in causes], tuple(series))


def _over_time(content: dict[str, Any], ranked: list[str]) -> Iterator[Chart]:
    title = "The same, pass by pass"
    passes = [row for row in content["outcomes"]["pages"]["passes"] if row["seq"] is not None]
    if len(passes) < 2:
        yield Absent(title, "there were not two passes")
        return
    if len(passes) > _MOST_PASSES_DRAWN:
        title += f" (the last {_MOST_PASSES_DRAWN} of {len(passes):,})"
        passes = passes[-_MOST_PASSES_DRAWN:]
    panels = tuple(
        Panel(
            f"{PAGE_OUTCOMES[name][0]}, pages a pass",
            (Series(name, [row["outcomes"].get(name, 0) for row in passes]),),
        )
        for name in ranked[:_MOST_PANELS]
    )
    yield Timeline(title, [seconds(content, row["begin_ns"]) for row in passes], panels)


def _by_process(processes: list[dict[str, Any]], ranked: list[str]) -> Chart:
    def counts(names: list[str]) -> list[float | None]:
        return [sum(row["outcomes"].get(name, 0) for name in names) for row in processes]

    most, others = ranked[:_MOST_SERIES], ranked[_MOST_SERIES:]
    series = [Series(PAGE_OUTCOMES[name][0], counts([name])) for name in most]
    if others:
        series.append(Series("others", counts(others)))
    names = [f"{printable(row['comm'] or 'unknown')} ({row['pid'] or '–'})" for row in processes]
    return Bars("The same, by process", "pages", names, tuple(series))
