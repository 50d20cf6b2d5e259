"""``ksmtrace report``: the report as text for people, or as JSON."""

from __future__ import annotations

import json
import shlex
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from ksmtrace.cli.table import render_table
from ksmtrace.units import text_bytes, text_count, text_duration, text_signal

_MOST_PASSES = 8
_MOST_PROCESSES = 20
_MOST_NAMES = 5
_BARS = "▁▂▃▄▅▆▇█"
_PAGE_BYTES = 4096


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything, exactly, as one JSON object.")
@click.option("--all", "everything", is_flag=True, help="All passes, processes and counters.")
def report(file: Path, as_json: bool, everything: bool) -> None:
    """Report what a recording holds: first whether it is complete, then what KSM did.

    \b
    Example:
      ksmtrace report host.ksmt
      ksmtrace report host.ksmt --json | jq .merges
    """
    from ksmtrace.analysis.recorded import gather
    from ksmtrace.analysis.report import make_report
    from ksmtrace.recording.reader import RecordingReader

    content = make_report(gather(RecordingReader(file)))
    if as_json:
        click.echo(json.dumps(content))
        return
    for line in _lines(file, content, everything):
        click.echo(line)


def _lines(file: Path, content: dict[str, Any], everything: bool) -> Iterator[str]:
    yield from _heading(file, content)
    sections = (
        _findings(content),
        _saved(content),
        _passes(content, everything),
        _visits(content),
        _merges(content),
        _removals(content),
        _unmerges(content, everything),
        _migrations(content, everything),
        _processes(content, everything),
        _sharing(content, everything),
        _counters(content, everything),
        _calls(content, everything),
        _events(content),
        _not_visible(content),
    )
    for section in sections:
        yield ""
        yield from section


def _heading(file: Path, content: dict[str, Any]) -> Iterator[str]:
    started = time.localtime(content["started_realtime_ns"] // 1_000_000_000)
    yield (
        f"{file}: Linux {content['kernel']['release']}, {text_duration(content['duration_ns'])} "
        f"from {time.strftime('%Y-%m-%d %H:%M:%S', started)}"
    )
    yield f"Recorded by: {shlex.join(content['command_line'])}"
    total = sum(count or 0 for count in content["events"].values())
    if content["complete"]:
        yield f"COMPLETE: {total:,} events, none lost; ended because: {content['ended_because']}"
    else:
        yield f"INCOMPLETE: {total:,} events, {content['lost']:,} lost"
        for reason in content["incomplete_because"]:
            yield f"  - {reason}"
    status = content["command_exit_status"]
    if status and status < 0:
        yield f"The recorded command was ended by {text_signal(-status)}"
    elif status:
        yield f"The recorded command failed: exit status {status}"


def _findings(content: dict[str, Any]) -> Iterator[str]:
    yield "WHAT ASKS FOR ACTION"
    for finding in content["findings"] or ["nothing found"]:
        yield f"  - {finding}"


def _saved(content: dict[str, Any]) -> Iterator[str]:
    counters = {entry["counter"]: entry for entry in content["counters"]}
    yield "IS KSM PAYING?  (the kernel's counters at the last sample)"
    if not counters:
        yield "  unknown: the recording has no two samples"
        return
    sharing, zero = counters["pages_sharing"]["last"], counters["ksm_zero_pages"]["last"]
    profit = counters["general_profit"]["last"]
    saved = (sharing or 0) + (zero or 0)
    yield (
        f"  saved: {text_bytes(saved * _PAGE_BYTES)} ({_exact(sharing)} pages_sharing"
        f"{'' if zero is None else f' + {zero:,} ksm_zero_pages'}); general_profit: "
        f"{'absent' if profit is None else text_bytes(profit)}"
    )
    broken = counters.get("cow_ksm", {}).get("delta")
    copied = "absent" if broken is None else f"{broken:,} pages"
    yield f"  copied again on write during the recording (cow_ksm): {copied}"
    ksmd = content["ksmd"] or {}
    if "cpu_ns" in ksmd:
        share = ksmd["cpu_ns"] / max(ksmd["elapsed_ns"], 1)
        merged = (content["merges"] or {}).get("succeeded")
        cost = ""
        if merged:
            cost = f", {text_duration(ksmd['cpu_ns'] / merged)} per merged page"
        yield (
            f"  ksmd: {text_duration(ksmd['cpu_ns'])} of CPU ({share:.1%} of one CPU), waited "
            f"{text_duration(ksmd['run_delay_ns'])} for one{cost}"
        )
    scanned = counters.get("pages_scanned", {}).get("delta")
    skipped = counters.get("pages_skipped", {}).get("delta")
    if scanned is not None or skipped is not None:
        yield (
            f"  pages scanned: {_exact(scanned)}, skipped by smart_scan: {_exact(skipped)}  "
            "(sampled)"
        )


def _visits(content: dict[str, Any]) -> Iterator[str]:
    visits = content["visits"]
    if visits is None:
        yield "PAGE BY PAGE: not visible on this kernel"
        return
    rungs = visits["rungs"]
    if visits["pages"] is None:
        yield "PAGE BY PAGE: looks at pages are not visible on this kernel"
    else:
        yield (
            f"PAGE BY PAGE: ksmd looked at {visits['pages']:,} pages"
            f"{_by_rung(rungs['cmp_and_merge_page'])}"
        )
    if visits["smart_scan_skips"] is not None:
        yield f"  {visits['smart_scan_skips']:,} more were skipped by smart_scan"
    interval = visits["visit_interval_ns"]
    if interval:
        low, high = map(text_duration, interval["median"])
        yield (
            f"  from one to the next: median {low} to {high}, 99% below "
            f"{text_duration(interval['p99'][1])} (with ksmd's sleep after each batch)"
        )
    searches = visits["searches"]
    if searches is None:
        yield "  searches of the stable tree: not visible on this kernel"
        return
    outcomes = ", ".join(
        f"{_OUTCOMES[name]} {count:,}" for name, count in searches.items() if count
    )
    yield (
        f"  {sum(searches.values()):,} searches of the stable tree"
        f"{_by_rung(rungs['stable_tree_search'])}{f' found: {outcomes}' if outcomes else ''}"
    )
    nodes = visits["search_nodes"]
    if nodes:
        yield (
            f"  stable_nodes looked up per search: median {_whole(*nodes['median'])}, 99% at most "
            f"{nodes['p99'][1] - 1:,}"
        )


_OUTCOMES = {
    "none": "nothing",
    "found": "an equal KSM page",
    "same_page": "the page itself, by a fork",
    "busy": "a locked one (-EBUSY)",
}


def _by_rung(rung: str | None) -> str:
    return f" ({rung})" if rung else ""


def _whole(low: int, below: int) -> str:
    return f"{low:,}" if below == low + 1 else f"{low:,} to {below - 1:,}"


def _passes(content: dict[str, Any], everything: bool) -> Iterator[str]:
    scans = content["scans"]
    if scans is None:
        yield "SCAN PASSES: not visible on this kernel"
        return
    passes = scans["passes"]
    yield f"SCAN PASSES: {scans['completed']} complete"
    if not passes:
        return
    if scans["completed"]:
        speed = scans["pages_per_cpu_second"]
        yield (
            f"  median {text_duration(scans['median_duration_ns'])}, longest "
            f"{text_duration(scans['longest_duration_ns'])}"
            + (f", {text_count(speed)} pages per second of ksmd CPU" if speed else "")
        )
    shown = passes if everything else passes[-_MOST_PASSES:]
    if len(shown) < len(passes):
        yield f"  the last {len(shown)} of {len(passes)} (--all shows all):"
    rows = []
    for one in shown:
        open_end = one["end_ns"] is None or one["begin_ns"] is None
        rows.append(
            [
                str(one["seq"]),
                "not seen whole" if open_end else text_duration(one["duration_ns"]),
                "–" if one["rmap_entries"] is None else f"{one['rmap_entries']:,}",
                "–" if one["cpu_ns"] is None else text_duration(one["cpu_ns"]),
                "–" if one["run_delay_ns"] is None else text_duration(one["run_delay_ns"]),
                f"{one['merged']:,}",
            ]
        )
    heads = ["seqnr", "duration", "rmap_items", "ksmd CPU (±1 tick)", "waited for CPU", "merged"]
    yield from _indent(render_table(heads, rows))


def _merges(content: dict[str, Any]) -> Iterator[str]:
    merges = content["merges"]
    if merges is None:
        yield "MERGES: not visible on this kernel"
        return
    rate = merges["success_rate"]
    yield (
        f"MERGES: {merges['attempts']:,} attempts, {merges['succeeded']:,} pages merged"
        + (f" ({rate:.1%})" if rate is not None else "")
        + f", {merges['new_stable_nodes']:,} new stable nodes"
    )
    for reason, count in merges["failed"].items():
        yield f"  {count:,} {_REASONS.get(reason, f'failed with {reason}')}"
    zero = content["zero_pages"]
    if zero is None:
        yield "  zero pages: not visible on this kernel"
    elif zero["attempts"]:
        yield f"  zero pages: {zero['attempts']:,} attempts, {zero['succeeded']:,} replaced"
    rates = content["rates"]
    if rates and merges["attempts"] + (zero or {"attempts": 0})["attempts"]:
        span_s = rates[0]["span_ns"] / 1e9
        for name, label in _RATES:
            counts = [row[name] for row in rates]
            if any(counts):
                peak = text_count(max(counts) / span_s)
                yield f"  {label:<17} {_spark(counts)}  at most {peak}/s"
        yield f"  {'':<17} one bar is {text_duration(rates[0]['span_ns'])}"


_REASONS = {
    "EFAULT": "failed with EFAULT: locked, pinned, changing, or unmapped meanwhile; the kernel's "
    "answer does not tell which",
    "undone": "were undone: the first page of a pair whose second one failed",
    "open": "have no known outcome: what followed is not in the recording",
}
_RATES = (
    ("merged", "merged"),
    ("failed", "failed"),
    ("zero_merged", "zero pages"),
    ("nodes_freed", "nodes freed"),
    ("sharers_removed", "sharers removed"),
    ("left_singly", "left singly"),
    ("migrated", "moved"),
)


def _removals(content: dict[str, Any]) -> Iterator[str]:
    removals = content["removals"]
    singly = next(
        (-e["difference"] for e in content["counters"]
         if e["counter"] == "pages_sharing" and e["verdict"] in ("explained", "exact")),
        None,
    )  # fmt: skip
    yield (
        f"REMOVALS: {_exact(removals['stable_nodes_freed'])} stable nodes freed, "
        f"{_exact(removals['sharers_removed_with_node'])} sharers removed with them (a node's last "
        "sharer has no event)"
    )
    single = removals["single_removals"]
    if single is None:
        yield (
            "  sharers that left singly (COW, unmap, unmerge, exit): not visible on this kernel; "
            + (
                "unknown"
                if singly is None
                else f"{singly:,} by the fall of pages_sharing (sampled)"
            )
        )
        return
    yield (
        f"  sharers that left singly (COW, unmap, unmerge, exit): {single['sharers']:,}, of which "
        f"{single['last_of_their_node']:,} were their node's last"
    )
    names = {str(process["pid"]): _name(process) for process in content["processes"]}
    most = list(single["by_pid"].items())
    if most:
        shown = [f"{names[pid]} ({pid}) {count:,}" for pid, count in most[:_MOST_NAMES]]
        yield f"  from {', '.join(shown)}{' ...' if len(most) > _MOST_NAMES else ''}"


def _unmerges(content: dict[str, Any], everything: bool) -> Iterator[str]:
    unmerges = content["unmerges"]
    if unmerges is None:
        yield "UNMERGING: not visible on this kernel"
        return
    if not unmerges["calls"]:
        yield "UNMERGING: none (no call of break_ksm)"
        return
    yield (
        f"UNMERGING: {unmerges['calls']:,} calls of break_ksm for {unmerges['pages']:,} pages, KSM "
        "pages or not"
    )
    for reason, count in unmerges["failed"].items():
        yield f"  {count:,} failed with {reason}"
    if not unmerges["ranges"]:
        yield (
            "  this kernel calls it for every address of an area: cow_ksm tells how many pages "
            "were copied"
        )
    for label, rows in (("by", unmerges["by_task"]), ("of", unmerges["by_owner"])):
        shown = rows if everything else rows[:_MOST_NAMES]
        names = ", ".join(
            f"{row['comm'] or 'unknown'} ({row['pid'] or '–'}) {row['pages']:,}" for row in shown
        )
        yield f"  {label} {names}{' ...' if len(shown) < len(rows) else ''}"


def _migrations(content: dict[str, Any], everything: bool) -> Iterator[str]:
    migrations = content["migrations"]
    if migrations is None:
        yield "MIGRATIONS: not visible on this kernel"
        return
    if not migrations["pages"]:
        yield "MIGRATIONS: none (no KSM page moved)"
        return
    behind = migrations["left_behind"]
    yield (
        f"MIGRATIONS: {migrations['pages']:,} moves of KSM pages, of "
        f"{migrations['stable_nodes']:,} stable nodes"
        + (f"; {behind:,} LEFT THEIR stable_node BEHIND" if behind else "")
    )
    routes = [
        f"{_node(route['from_node'])} to {_node(route['to_node'])}: {route['pages']:,}"
        for route in migrations["routes"]
    ]
    yield f"  {', '.join(routes) or 'page frame numbers are not known here'}"
    if everything:
        for mover in migrations["busiest"]:
            yield (
                f"  stable_node {mover['stable_node']}: moved {mover['moves']:,}×, last to pfn "
                f"{mover['pfn']:,}"
            )


def _node(node: int | None) -> str:
    return "unknown node" if node is None else f"node {node}"


def _processes(content: dict[str, Any], everything: bool) -> Iterator[str]:
    processes = sorted(
        content["processes"],
        key=lambda p: (-(p["ksm_merging_pages"] or 0), -p["merged_pages"], p["pid"] or 0),
    )
    yield f"PROCESSES: {len(processes)}"
    if not processes:
        return
    shown = processes if everything else processes[:_MOST_PROCESSES]
    if len(shown) < len(processes):
        yield f"  the first {len(shown)} (--all shows all):"
    rows = [
        [
            "–" if p["pid"] is None else str(p["pid"]),
            _name(p),
            f"{p['merged_pages']:,}",
            f"{p['failed_attempts']:,}",
            f"{p['removed_pages'] + (p['left_singly_pages'] or 0):,}",
            f"{p['zero_merged_pages']:,}",
            _exact(p["ksm_merging_pages"]),
            {"ksm_exit": "at exit", "sample": "last sample"}.get(p["counted_by"] or "", "–"),
            _difference(p["difference"]),
            f"{p['shared_with_others_pages']:,}",
            p["cgroup"] or "–",
        ]
        for p in shown
    ]
    heads = [
        "pid", "who", "merged", "failed", "removed", "zero", "ksm_merging_pages", "read",
        "against events", "shared with others", "cgroup",
    ]  # fmt: skip
    yield from _indent(render_table(heads, rows, left=(1, 7, 10)))
    if any((p["difference"] or 0) < 0 for p in shown):
        yield (
            "  against events: -N of a process's pages left singly or as their node's last sharer, "
            "without an event"
        )


def _difference(difference: int | None) -> str:
    if difference is None:
        return "unknown"
    return "exact" if difference == 0 else f"{difference:+,}"


def _sharing(content: dict[str, Any], everything: bool) -> Iterator[str]:
    yield "WHO SHARES WITH WHOM  (pages as they merged during the recording)"
    pairs: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for process in content["processes"]:
        one = f"{_name(process)} ({process['pid']})"
        for other in process["shared_with"]:
            names = sorted((one, f"{_name(other)} ({other['pid']})"))
            pair = pairs.setdefault((names[0], names[1]), {})
            pair[one] = other["pages"], process["merged_pages"]
    if not pairs:
        yield "  no two processes merged into the same KSM page during the recording"
        return
    most = sorted(pairs.items(), key=lambda pair: -max(pages for pages, _ in pair[1].values()))
    shown = most if everything else most[:_MOST_PROCESSES]
    rows = [
        [cell for name in names for cell in (name, _part(*counts.get(name, (0, 0))))]
        for names, counts in shown
    ]
    heads = ["who", "merged pages that the other has too", "and whom", "of these"]
    yield from _indent(render_table(heads, rows, left=(0, 2)))
    if len(shown) < len(pairs):
        yield f"  ... and {len(pairs) - len(shown)} pairs more (--all shows all)"


def _part(pages: int, merged: int) -> str:
    return f"{pages:,} of {merged:,} ({pages / max(merged, 1):.0%})"


def _counters(content: dict[str, Any], everything: bool) -> Iterator[str]:
    yield "COUNTERS, AND WHAT THE EVENTS SAY THEY SHOULD BE"
    if not content["counters"]:
        yield "  unknown: the recording has no two samples"
        return
    rows = [
        [
            entry["counter"],
            _exact(entry["first"]),
            _exact(entry["last"]),
            _signed(entry["delta"]),
            _signed(entry["events_say"]),
            _signed(entry["difference"]),
            entry["verdict"],
            entry["why"],
        ]
        for entry in content["counters"]
        if everything or entry["events_say"] is not None or entry["delta"]
    ]
    heads = ["counter", "first", "last", "change", "events say", "difference", "", ""]
    yield from _indent(render_table(heads, rows, left=(0, 6, 7)))


def _calls(content: dict[str, Any], everything: bool) -> Iterator[str]:
    calls = content["calls"]
    if calls is None:
        yield "FUNCTIONS: no programs on any"
        return
    yield "FUNCTIONS WITH PROGRAMS"
    rows = [
        [
            name,
            "–" if call["entered"] is None else f"{call['entered']:,}",
            "–" if call["returned"] is None else f"{call['returned']:,}",
            *(
                text_duration(call["duration"][key]) if call["duration"] else "–"
                for key in ("median_ns", "p99_ns", "max_ns")
            ),
            ", ".join(f"{result}: {count:,}" for result, count in (call["results"] or {}).items())
            or "–",
        ]
        for name, call in calls.items()
        if everything or call["entered"] or call["returned"]
    ]
    if not rows:
        yield "  none of them ran"
        return
    heads = ["function", "entered", "returned", "median", "99% within", "longest", "results"]
    yield from _indent(render_table(heads, rows, left=(0, 6)))


def _events(content: dict[str, Any]) -> Iterator[str]:
    yield "EVENTS, BY HOW THEY WERE CAUGHT"
    by_rung: dict[str, list[str]] = {}
    for name, rung in content["rungs"].items():
        count = content["events"][name]
        text = f"{name} {count:,}" if count is not None else f"{name} only counted"
        by_rung.setdefault(rung, []).append(name if rung == "absent" else text)
    for rung in sorted(by_rung, key=lambda rung: rung == "absent"):
        yield from _wrap(f"{rung}: {', '.join(by_rung[rung])}", "  ", "      ")


def _wrap(text: str, first: str, following: str) -> list[str]:
    width = shutil.get_terminal_size((100, 24)).columns
    return textwrap.wrap(
        text,
        width=max(width, 60),
        initial_indent=first,
        subsequent_indent=following,
        break_on_hyphens=False,
    )


def _not_visible(content: dict[str, Any]) -> Iterator[str]:
    yield "NOT VISIBLE ON THIS KERNEL"
    for gap in content["not_visible"]:
        yield from _wrap(f"{gap['what']}: {gap['why']}", "  - ", "      ")


def _name(process: dict[str, Any]) -> str:
    if process["guest"]:
        return f"guest {process['guest']}"
    if process["pid"] is None:
        return "gone before the recording"
    return process["comm"] or "unknown"


def _exact(value: Any) -> str:
    if value is None:
        return "absent"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _signed(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value:+,}" if value else "0"


def _spark(counts: Sequence[int]) -> str:
    peak = max(counts)
    return "".join(
        " " if count == 0 else _BARS[max(0, -(-count * len(_BARS) // peak) - 1)] for count in counts
    )


def _indent(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield f"  {line}"
