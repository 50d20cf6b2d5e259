"""What KSM costs the processes whose pages it merges, and the machine, and whether it pays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Bars, Chart, Histogram, Panel, Series, Timeline
from ksmtrace.cli.sections.words import MOST_NAMES, MOST_ROWS, exact, seconds, slots_of
from ksmtrace.cli.table import indent, printable, render_table
from ksmtrace.units import text_bytes, text_duration


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    yield "COSTS, AND WHETHER KSM PAYS"
    of_all = not content["selection"] or content["selection"]["pids"] is None
    yield from _profit(content["profit"], of_all, everything)
    yield from _cow(content["cow"], content, everything)
    yield from _delays(content, everything)
    yield from _unmerges(content["unmerges"])
    for key, what in _HAPPENINGS:
        yield from _happenings(content[key], what, everything)
    yield from _migrations(content["migrations"])


_HAPPENINGS = (
    ("undone_merges", "merges undone by ksmd (break_cow)"),
    ("swap_ins", "copies at swap-in (ksm_might_need_to_copy)"),
    ("splits", "huge pages split by ksmd"),
)


def _profit(profit: dict[str, Any], of_all: bool, everything: bool) -> Iterator[str]:
    earned, samples = profit["yield"], profit["samples"]
    if samples and samples[-1]["formula_bytes"] is not None:
        last = samples[-1]
        yield (
            f"  profit by the kernel's formula: {text_bytes(last['formula_bytes'])} "
            f"({exact(last['pages_sharing'])} pages_sharing, {exact(last['ksm_zero_pages'])} "
            f"ksm_zero_pages, {last['rmap_items']:,} rmap_items)"
        )
    truth = profit["page_truth"]
    if not truth:
        yield "  profit by what is mapped: unknown, not recorded (`record --witnesses` reads it)"
    else:
        yield "  profit by what is mapped, beside the counters:"
        shown = truth if everything else truth[-MOST_NAMES:]
        keys = ("places", "frames", "saved_pages", "pages_sharing", "gap_pages", "zero_places")
        rows = [
            [
                row["moment"],
                *("–" if row[key] is None else f"{row[key]:,}" for key in keys),
                "–" if row["ksm_zero_pages"] is None else f"{row['ksm_zero_pages']:,}",
                "–" if row["profit_bytes"] is None else text_bytes(row["profit_bytes"]),
            ]
            for row in shown
        ]
        heads = [
            "read", "places", "KSM frames", "saved", "pages_sharing", "gap", "zero pages mapped",
            "ksm_zero_pages", "profit",
        ]  # fmt: skip
        yield from indent(indent(render_table(heads, rows, left=(0,))))
        if profit["most_split_zero_pages"]:
            yield (
                f"  up to {profit['most_split_zero_pages']:,} pages were saved by splitting huge "
                "pages that held zeros, and not by KSM's merging"
            )
    if earned is None:
        return
    each = earned["cpu_ns_per_merged_page"]
    rate = earned["saved_pages_per_cpu_second"]
    yield (
        f"  ksmd: {text_duration(earned['cpu_ns'])} on a CPU, "
        f"{text_duration(earned['run_delay_ns'])} waiting for one, "
        f"{text_duration(earned['off_cpu_ns'])} asleep or blocked"
        + (f"; {text_duration(each)} per merged page" if each and of_all else "")
        + (f"; {rate:,.0f} pages saved per CPU second" if rate is not None else "")
    )


def _cow(cow: dict[str, Any] | None, content: dict[str, Any], everything: bool) -> Iterator[str]:
    if cow is None:
        counter = next((c for c in content["counters"] if c["counter"] == "cow_ksm"), None)
        counted = (
            "unknown, as there are no two samples"
            if not content["counters"]
            else "absent, too"
            if counter is None or counter["delta"] is None
            else f"{counter['delta']:,}, unmerges included"
        )
        yield f"  copies on write: not visible on this kernel; by cow_ksm {counted}"
        return
    causes = ", ".join(f"{name} {count:,}" for name, count in cow["by_cause"].items() if count)
    yield f"  copies on write: {cow['copies']:,} KSM pages" + (f" ({causes})" if causes else "")
    for reason, count in cow["failed"].items():
        yield f"    {count:,} more faults ended with {reason}"
    if cow["zero_page_writes"]:
        yield f"    {cow['zero_page_writes']:,} more were of zero pages placed by KSM"
    regret = cow["regret"]
    if regret and regret["copies"]:
        yield (
            f"    regret: {regret['regretted']:,} of {regret['merged']:,} merged pages were "
            f"written to within {text_duration(regret['within_ns'])}; the median copy came "
            f"{text_duration(regret['median_kept_ns'])} after its merge"
        )
    writers = cow["by_process"]
    if not writers:
        return
    shown = writers if everything else writers[:MOST_NAMES]
    rows = [
        [
            "–" if row["pid"] is None else str(row["pid"]),
            row["comm"] or "unknown",
            f"{row['copies']:,}",
            *(
                text_duration(row["latency"][key]) if row["latency"] else "–"
                for key in ("median_ns", "p99_ns", "max_ns")
            ),
            text_duration(row["total_ns"]),
            f"{row['regretted']:,}",
        ]
        for row in shown
    ]
    heads = ["pid", "who", "copies", "median", "99% within", "longest", "together", "regretted"]
    yield from indent(indent(render_table(heads, rows, left=(1,))))


def _delays(content: dict[str, Any], everything: bool) -> Iterator[str]:
    delays = content["cow_delays"]
    if delays is None:
        yield "  delayed by copies on write, KSM's and others: the kernel did not account that"
        return
    delayed = [row for row in delays if row["copies"]]
    shown = delayed if everything else delayed[:MOST_NAMES]
    names = ", ".join(
        f"{row['comm'] or 'unknown'} ({row['pid']}) {text_duration(row['delay_ns'])} by "
        f"{row['copies']:,}"
        for row in shown
    )
    yield (
        f"  delayed by copies on write, KSM's and others: {names or 'no process seen'}"
        f"{' ...' if len(shown) < len(delayed) else ''}"
    )


def _unmerges(unmerges: dict[str, Any] | None) -> Iterator[str]:
    if unmerges is None:
        yield "  unmerging: not visible on this kernel"
        return
    if unmerges["duration"]:
        faults, copied = unmerges["faults"], unmerges["copied"]
        per_page = f", {faults / copied:.2f} faults per page copied" if copied else ""
        yield (
            f"  unmerging: {unmerges['calls']:,} calls of break_ksm, "
            f"{_durations(unmerges['duration'])}; {exact(copied)} pages copied{per_page}"
        )
    for write in unmerges["run_writes"] or []:
        if write["run"] != 2:
            continue
        took = text_duration(write["duration_ns"]) if write["duration_ns"] else "unknown"
        left = write["pages_left"]
        ended = (
            "unmerged all"
            if write["result"] == "0"
            else f"ENDED WITH {write['result']} AND UNMERGED A PART ONLY"
        )
        yield (
            f"    run=2 by {write['comm'] or 'unknown'} ({write['pid']}) {ended}, in {took}"
            + (f"; {left:,} pages on stable_nodes at the next sample" if left else "")
        )


def _happenings(happenings: dict[str, Any] | None, what: str, everything: bool) -> Iterator[str]:
    if happenings is None:
        yield f"  {what}: not visible on this kernel"
        return
    who = happenings["by_process"]
    shown = who if everything else who[:MOST_NAMES]
    names = ", ".join(
        f"{row['comm'] or 'unknown'} ({row['pid'] or '–'}) {row['count']:,}" for row in shown
    )
    yield (
        f"  {what}: {happenings['count']:,}"
        + (f", {_durations(happenings['duration'])}" if happenings["duration"] else "")
        + "".join(f"; {n:,} failed with {name}" for name, n in happenings["failed"].items())
        + (f"; {names}{' ...' if len(shown) < len(who) else ''}" if names else "")
    )


def _migrations(migrations: dict[str, Any] | None) -> Iterator[str]:
    unmapped = migrations["unmapped"] if migrations else None
    if unmapped is None:
        return
    yield (
        f"  migrations: {unmapped['pages']:,} KSM pages without mappings meanwhile, "
        + (_durations(unmapped["duration"]) if unmapped["duration"] else "for an unknown time")
        + f"; sharers that waited: median {unmapped['median_sharers']:,}, at most "
        f"{unmapped['most_sharers']:,}"
    )


def _durations(duration: dict[str, int]) -> str:
    median, p99, longest = (
        text_duration(duration[key]) for key in ("median_ns", "p99_ns", "max_ns")
    )
    return f"median {median}, 99% within {p99}, longest {longest}"


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield how long copies and unmerges took, whose they were, and whether that pays."""
    cow = content["cow"]
    title = "Copies on write, from the fault's entry to its exit"
    if cow is None:
        yield Absent(title, "copies on write are not visible on this kernel")
    elif not cow["latency_histogram"]:
        yield Absent(title, "there was none")
    else:
        yield Histogram(title, "ns", slots_of(cow["latency_histogram"]))
    writers = (cow["by_process"] if cow else [])[:MOST_ROWS]
    if writers:
        names = [f"{printable(row['comm'] or 'unknown')} ({row['pid'] or '–'})" for row in writers]
        soon = [row["regretted"] for row in writers]
        later = [row["copies"] - row["regretted"] for row in writers]
        series = (Series("soon after the merge (regret)", soon), Series("others", later))
        yield Bars("Copies on write of each process's pages", "copies", names, series)
    unmerges = content["unmerges"]
    title = "Unmerging: calls of break_ksm, from entry to exit"
    if unmerges is None:
        yield Absent(title, "unmerging is not visible on this kernel")
    elif not unmerges["duration_histogram"]:
        yield Absent(title, "there was none")
    else:
        yield Histogram(title, "ns", slots_of(unmerges["duration_histogram"]))
    yield from _truth_chart(content)


def _truth_chart(content: dict[str, Any]) -> Iterator[Chart]:
    title = "What is saved: the kernel's counter, and what is mapped"
    truth = [row for row in content["profit"]["page_truth"] if row["saved_pages"] is not None]
    if len(truth) < 2:
        yield Absent(title, "what is mapped was not read twice (`record --witnesses` reads it)")
        return
    counted = Series("pages_sharing", [row["pages_sharing"] for row in truth])
    mapped = Series("by what is mapped", [row["saved_pages"] for row in truth], dashed=True)
    gap = Series("gap", [row["gap_pages"] for row in truth])
    panels = (
        Panel("pages saved", (counted, mapped)),
        Panel("gap: pages_sharing less what is mapped", (gap,)),
    )
    yield Timeline(title, [seconds(content, row["ts_ns"]) for row in truth], panels)
