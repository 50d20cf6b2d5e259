"""The processes, and what they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .draw import (
    BOLD,
    MUTED,
    Line,
    Look,
    absence,
    count,
    duration,
    gap,
    line,
    rate,
    size,
    wrapped,
)
from .happened import event_lines, events
from .moment import Shown
from .tables import (
    Column,
    Row,
    Table,
    Value,
    View,
    arranged,
    exactly,
    or_dash,
    since_start,
    who,
    word,
)

if TYPE_CHECKING:
    from ksmtrace.analysis.live import Picture
    from ksmtrace.analysis.process_tally import LiveProcess


_count, _size, _rate = or_dash(count), or_dash(size), or_dash(rate)

PROCESS_COLUMNS = (
    Column("pid", "pid", word, meaning="the owner's tgid"),
    Column("who", "who", word, right=False, meaning="guest, or comm"),
    Column("ksm_merging_pages", "merged", _count, meaning="pages that share a KSM page now"),
    Column("saved_bytes", "saves", _size, meaning="ksm_process_profit: saved, less rmap_items"),
    Column("merged_per_s", "merges", _rate, meaning="pages merged per second, over two seconds"),
    Column("left_per_s", "leaves", _rate, meaning="sharers that left per second"),
    Column(
        "regretted_pages", "regret", _count, meaning="merged pages written to within 10 s, so far"
    ),
    Column("copy_mean_ns", "COW", duration, meaning="mean time of a copy of a KSM page on write"),
    Column("ksm_rmap_items", "mergeable", _count, meaning="rmap_items: pages that ksmd looks at"),
    Column("merged_pages", "so far", _count, meaning="pages merged since the start"),
    Column("failed_attempts", "failed", _count, meaning="attempts that failed"),
    Column("left_pages", "left", _count, meaning="sharers that left, as far as events tell"),
    Column("ksm_zero_pages", "zero", _count, meaning="pages that are the zero page now"),
    Column("copies", "copies", _count, meaning="copies of its KSM pages on write; no unmerge"),
    Column("longest_copy_ns", "longest", duration, meaning="the longest of these copies"),
    Column("cgroup", "cgroup", word, right=False, meaning="its control group"),
)
GROUP_COLUMNS = (
    Column("who", "who", word, right=False, meaning="guest or control group"),
    Column("processes", "processes", exactly, meaning="processes in it"),
    *(c for c in PROCESS_COLUMNS if c.name not in ("pid", "who", "cgroup")),
)
GROUPINGS = ("process", "cgroup", "guest")
_NOT_SUMMED = ("who", "processes", "copy_mean_ns", "longest_copy_ns")
_SUMMED = (
    *(c.name for c in GROUP_COLUMNS if c.name not in _NOT_SUMMED),
    "copies_took_ns",
)


def process_values(process: LiveProcess) -> dict[str, Value]:
    """Return a process's exact values by column."""
    profit = process.stat.get("ksm_process_profit")
    gone = process.exited_ns is not None
    return {
        "pid": process.pid,
        "who": f"{process.name} (exited)" if gone else process.name,
        "ksm_merging_pages": process.ksm_merging_pages,
        "saved_bytes": profit if isinstance(profit, int) and not gone else None,
        "merged_per_s": process.merged_per_s,
        "left_per_s": process.left_per_s,
        "regretted_pages": process.regretted_pages,
        "copies": process.copies,
        "copies_took_ns": process.copies_took_ns,
        "copy_mean_ns": _mean(process.copies_took_ns, process.copies),
        "longest_copy_ns": process.longest_copy_ns or None,
        "ksm_rmap_items": process.ksm_rmap_items,
        "merged_pages": process.merged_pages,
        "failed_attempts": process.failed_attempts,
        "left_pages": process.left_pages,
        "ksm_zero_pages": process.ksm_zero_pages,
        "cgroup": process.cgroup,
    }


def _mean(total: Value, number: Value) -> int | None:
    if not (isinstance(total, int) and isinstance(number, int) and number):
        return None
    return total // number


def processes(shown: Shown, view: View) -> Table:
    """List the processes, or what they belong to."""
    picture = shown.picture
    if picture is None:
        return Table(PROCESS_COLUMNS, empty=f"starting: {shown.says}")
    if view.by in ("cgroup", "guest"):
        return _groups(picture, view)
    rows = _process_rows(picture.processes)
    empty = "no process has mergeable memory"
    if view.sort:
        return arranged(PROCESS_COLUMNS, rows, view, empty)
    whole = replace(view, sort="ksm_merging_pages", most=None)
    table = arranged(PROCESS_COLUMNS, rows, whole, empty)
    # Those that are alive come first.
    alive = sorted(table.rows, key=lambda row: row.style == MUTED)
    return replace(table, rows=tuple(alive[: view.most]))


_drawn: dict[int, tuple[LiveProcess, Row]] = {}


def _process_rows(processes: Sequence[LiveProcess]) -> list[Row]:
    # A process that has not changed is the same object, of which there may be thousands.
    global _drawn
    before, _drawn = _drawn, {}
    for one in processes:
        known = before.get(one.key)
        if known is None or known[0] is not one:
            style = MUTED if one.exited_ns is not None else ""
            known = one, Row(str(one.key), process_values(one), style)
        _drawn[one.key] = known
    return [row for _, row in _drawn.values()]


def _groups(picture: Picture, view: View) -> Table:
    members: dict[str, list[dict[str, Value]]] = {}
    for one in picture.processes:
        if one.exited_ns is not None:
            continue
        name = one.cgroup if view.by == "cgroup" else one.guest
        members.setdefault(name or "–", []).append(process_values(one))
    rows = []
    for name, values in members.items():
        summed: dict[str, Value] = {"who": name, "processes": len(values)}
        for column in _SUMMED:
            known = [value for one in values if isinstance(value := one[column], int | float)]
            summed[column] = sum(known) if known else None
        summed["copy_mean_ns"] = _mean(summed["copies_took_ns"], summed["copies"])
        longest = [ns for one in values if isinstance(ns := one["longest_copy_ns"], int)]
        summed["longest_copy_ns"] = max(longest, default=None)
        rows.append(Row(name, summed))
    sorted_by = view if view.sort else replace(view, sort="ksm_merging_pages")
    return arranged(GROUP_COLUMNS, rows, sorted_by, "no process is alive")


def find_process(picture: Picture, key: str) -> LiveProcess | None:
    """Return the process of a row, None where it is no longer listed."""
    return next((one for one in picture.processes if str(one.key) == key), None)


def process_detail(
    shown: Shown, key: str, look: Look, regions: Sequence[str] | None = None
) -> list[Line]:
    """Say everything about one process.

    Args:
        shown: the moment.
        key: of its row.
        look: how things are written.
        regions: its mergeable areas, a line each; None where nobody has read them.
    """
    picture = shown.picture
    process = find_process(picture, key) if picture else None
    if picture is None or process is None:
        return [line("this process is no longer listed", MUTED)]
    started_ns = picture.header.started_ns
    lines: list[Line] = [
        [(f"{process.name}", BOLD), (f"  pid {process.pid or 'unknown'}", "")],
        [("cgroup ", MUTED), (process.cgroup or "unknown", "")],
        [
            ("mm ", MUTED),
            ("unknown" if process.mm is None else f"{process.mm:#x}", ""),
            ("  entered ", MUTED),
            (since_start(process.entered_ns, started_ns, "before"), ""),
            ("  left ", MUTED),
            (since_start(process.exited_ns, started_ns, "not"), ""),
        ],
        [],
        [("SINCE THE START", BOLD)],
        *_pairs(
            {
                "merged": process.merged_pages,
                "failed": process.failed_attempts,
                "left with their node": process.removed_pages,
                "left singly": process.left_singly_pages
                if picture.recorded().can_see("remove_rmap_item_from_tree")
                else None,
                "zero pages placed": process.zero_merged_pages,
                "looked at": process.visited_pages or None,
            },
            look,
        ),
        [],
        *_copies(picture, process, look),
        [],
        [("KSM_STAT", BOLD), (f"  by {process.counted_by or 'nothing'}", MUTED)],
        *_pairs(dict(process.stat), look),
    ]
    lines += [[], [("SHARES WITH", BOLD)], *_partners(picture, process, look)]
    if regions is not None:
        lines += [[], [("MERGEABLE AREAS", BOLD)], *(line(f"  {one}") for one in regions)]
    if process.pid:
        lines += [[], [("LAST EVENTS", BOLD)]]
        rows = events(shown, View(search=f"pid:{process.pid}")).rows[-15:]
        lines += [one for row in rows for one in event_lines(row, look)]
        if not rows:
            lines.append(line("  none kept", MUTED))
    return lines


def _copies(picture: Picture, process: LiveProcess, look: Look) -> list[Line]:
    heading: Line = [("COPIES ON WRITE", BOLD)]
    if process.copies is None:
        return [[*heading, ("  not visible", MUTED)], *gap(picture, "do_wp_page", look)]
    heading.append((f"  {process.copies:,} of its KSM pages, by no unmerge", ""))
    mean = _mean(process.copies_took_ns, process.copies)
    times = {"mean": mean, "longest": process.longest_copy_ns, "together": process.copies_took_ns}
    regretted = process.regretted_pages
    text = "not visible" if regretted is None else f"{regretted:,}"
    return [
        heading,
        *([(f"  {name:<24}", MUTED), (duration(ns or None, look), BOLD)]
          for name, ns in times.items()),
        [("  regret                  ", MUTED), (text, BOLD), (_REGRET, MUTED)],
    ]  # fmt: skip


_MOST_GAP = 3
_REGRET = "  merged pages written to within 10 s"


def processes_gap(shown: Shown, look: Look) -> list[Line]:
    """Say why there are columns without a value, above the table."""
    picture = shown.picture
    if picture is None or picture.recorded().can_see("do_wp_page"):
        return []
    why = absence(picture, "do_wp_page")
    lines = wrapped(f"regret, COW: not visible: {why}", look.width, MUTED)
    if len(lines) <= _MOST_GAP:
        return lines
    return [*lines[: _MOST_GAP - 1], line("... (all of it where a process is opened)", MUTED)]


def _partners(picture: Picture, process: LiveProcess, look: Look) -> list[Line]:
    import numpy as np

    state = picture.trees.state if picture.trees else None
    if state is None or process.mm is None:
        return [line("  unknown", MUTED)]
    items = state.rmap_items
    sharers = items[items["stable_node"] >= 0]
    own = sharers["mm"] == process.mm
    node_is_own = np.zeros(len(state.stable_nodes) + 1, bool)
    node_is_own[sharers["stable_node"][own]] = True
    others = sharers[node_is_own[sharers["stable_node"]] & ~own]
    lines: list[Line] = [
        line(f"  {int(own.sum()):,} of its pages share {int(node_is_own.sum()):,} stable nodes")
    ]
    pids, counts = np.unique(others["pid"], return_counts=True)
    for at in np.argsort(-counts)[:10].tolist():
        pid = int(pids[at])
        name = who(picture, pid)
        lines.append(line(f"  {name}: {int(counts[at]):,} pages at the same nodes"))
    return lines


def _pairs(values: Mapping[str, Any], look: Look) -> list[Line]:
    return [
        [
            (f"  {name:<24}", MUTED),
            (
                ("absent" if value is None else str(value))
                if not isinstance(value, int)
                else f"{value:,}",
                MUTED if value is None else BOLD,
            ),
        ]
        for name, value in values.items()
    ]
