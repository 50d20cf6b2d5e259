"""Who waited for locks, and for whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Bars, Chart, Histogram, Series
from ksmtrace.cli.sections.words import MOST_NAMES, MOST_ROWS, slots_of
from ksmtrace.cli.table import indent, printable, render_table
from ksmtrace.units import text_duration
from ksmtrace.words import HELD_BY

_MOST_WORST = 2
_MOST_FRAMES = 6


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    locks = content["contention"]
    if all(lock["waits"] is None and lock["holds"] is None for lock in locks.values()):
        yield f"LOCKS: not visible here: {next(iter(locks.values()))['why_not']['waits']}"
        return
    yield "LOCKS: waits of ksmd, and of others for ksmd; ksmd's own holds"
    rows = [
        [name, *_times(lock, "wait"), *_times(lock, "hold")]
        for name, lock in locks.items()
        if everything or lock["waits"] or lock["holds"]
    ]
    if not rows:
        yield "  none"
    else:
        heads = ["lock", "waits", "together", "median", "longest", "holds", "together", "median"]
        yield from indent(render_table([*heads, "longest"], rows))
    for name, lock in locks.items():
        for label, parties in (("waited", lock["waiters"]), ("were waited for", lock["holders"])):
            if parties:
                shown = parties if everything else parties[:MOST_NAMES]
                names = ", ".join(_party(party) for party in shown)
                more = " ..." if len(shown) < len(parties) else ""
                yield f"  {name}: {label}: {names}{more}"
        worst = lock["worst"] if everything else lock["worst"][:_MOST_WORST]
        for wait in worst:
            yield from _wait(wait, everything)
    yield from _lookups(content)
    yield from _walks(content)
    if everything:
        for name, lock in locks.items():
            for what, why in lock["why_not"].items():
                yield f"  {name}: {what} not visible: {why}"


def _lookups(content: dict[str, Any]) -> Iterator[str]:
    lookups = content["lookups"]
    if lookups:
        duration = lookups["duration_ns"]
        long = content["contention"]["refcount"]["waits"]
        yield (
            f"  {lookups['calls']:,} look-ups of a stable_node's page (get_ksm_page): median < "
            f"{text_duration(duration['median'][1])}, 99% < {text_duration(duration['p99'][1])}; "
            f"{long:,} spun or were interrupted for 20 µs or more: refcount"
        )


def _walks(content: dict[str, Any]) -> Iterator[str]:
    walks = content["walks"]
    if not walks:
        return
    yield "  walks over all that map a KSM page (rmap_walk_ksm), whose lock is held meanwhile:"
    rows = [
        [
            f"{row['from']:,}" + (f" to {row['below'] - 1:,}" if row["below"] > 2 else ""),
            f"{row['walks']:,}",
            *(text_duration(row[f"{name}_ns"]) for name in ("total", "median", "p99", "longest")),
        ]
        for row in walks
    ]
    heads = ["sharers", "walks", "together", "median", "99%", "longest"]
    yield from indent(render_table(heads, rows))


def _times(lock: dict[str, Any], side: str) -> list[str]:
    count = lock[f"{side}s"]
    if count is None:
        return ["–"] * 4
    histogram = lock[f"{side}_histogram"]
    return [
        f"{count:,}",
        text_duration(lock[f"total_{side}_ns"]),
        f"< {text_duration(histogram['median'][1])}" if histogram else "–",
        text_duration(lock[f"worst_{side}_ns"]) if lock[f"worst_{side}_ns"] else "–",
    ]


def _who(comm: str | None) -> str:
    return printable(comm or "unknown")


def _party(party: dict[str, Any]) -> str:
    return (
        f"{_who(party['comm'])} ({party['pid']}) {party['waits']:,}×, "
        f"{text_duration(party['total_ns'])}"
    )


def _wait(wait: dict[str, Any], everything: bool) -> Iterator[str]:
    holder = ""
    if wait["holder_pid"]:
        who = f"{_who(wait['holder'])} ({wait['holder_pid']})"
        holder = f", {HELD_BY[wait['holder_by']].format(who)}"
    how = f"{', exiting' if wait['exiting'] else ''}{'' if wait['exclusive'] else ', to read'}"
    yield (
        f"    {text_duration(wait['duration_ns'])}: {_who(wait['comm'])} ({wait['pid']})"
        f"{how}{holder}"
    )
    if wait["stack"]:
        names = [frame.partition("+")[0] for frame in wait["stack"]]
        shown = names if everything else names[:_MOST_FRAMES]
        yield f"      {' < '.join(shown)}{' ...' if len(shown) < len(names) else ''}"


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield who waited how long, and how long waits and holds were."""
    title = "Time waited, by lock and by who waited"
    locks = content["contention"]
    if all(lock["waits"] is None for lock in locks.values()):
        yield Absent(title, next(iter(locks.values()))["why_not"]["waits"])
    else:
        parties = [
            (f"{name}: {_who(party['comm'])} ({party['pid']})", party["total_ns"] / 1e6)
            for name, lock in locks.items()
            for party in lock["waiters"]
        ]
        parties.sort(key=lambda party: -party[1])
        shown = parties[:MOST_ROWS]
        if shown:
            waited = Series("waited", [ms for _, ms in shown])
            yield Bars(title, "ms, by events", [name for name, _ in shown], (waited,))
        else:
            yield Absent(title, "nobody waited")
    for name, lock in locks.items():
        for side, what in (("wait", "waits"), ("hold", "holds by ksmd")):
            if lock[f"{side}_histogram"]:
                yield Histogram(f"{name}: {what}", "ns", slots_of(lock[f"{side}_histogram"]))
