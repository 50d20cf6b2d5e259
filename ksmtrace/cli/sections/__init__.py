"""The sections of ``ksmtrace report``: one module per topic, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ksmtrace.cli.charts import Chart
from ksmtrace.cli.sections import (
    calls,
    costs,
    counters,
    events,
    findings,
    locks,
    merges,
    migrations,
    not_visible,
    outcomes,
    processes,
    races,
    removals,
    saved,
    scans,
    sharing,
    unmerges,
    visits,
)
from ksmtrace.cli.table import wrap


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        name: what ``--section`` calls it.
        title: what it is about, for people.
        lines: yields its lines from what make_report returns; the second argument asks for every
            row of its tables.
        keys: what ``--json --section`` prints of make_report's topics.
        charts: yields what ``--html`` draws, from what make_report returns; None where nothing.
    """

    name: str
    title: str
    lines: Callable[[dict[str, Any], bool], Iterator[str]]
    keys: tuple[str, ...]
    charts: Callable[[dict[str, Any]], Iterator[Chart]] | None = None

    def text(self, content: dict[str, Any], everything: bool) -> Iterator[str]:
        """Yield its lines, and what of it is of all processes although some were chosen."""
        first, *others = self.lines(content, everything)
        yield first
        of_all = content["selection"]["of_all_processes"] if content["selection"] else {}
        for why in dict.fromkeys(of_all[key] for key in self.keys if key in of_all):
            yield from wrap(f"of all processes: {why})", "  (", "   ")
        yield from others


SECTIONS = (
    Section("findings", "What asks for action", findings.lines, ("findings",)),
    Section("saved", "Is KSM paying?", saved.lines, ("trees", "ksmd", "counters"), saved.charts),
    Section("scans", "Scan passes", scans.lines, ("scans",), scans.charts),
    Section("visits", "Page by page", visits.lines, ("visits",), visits.charts),
    Section("merges", "Merges", merges.lines, ("merges", "zero_pages", "rates"), merges.charts),
    Section("outcomes", "Outcomes", outcomes.lines, ("outcomes",), outcomes.charts),
    Section("removals", "Removals", removals.lines, ("removals",)),
    Section("unmerges", "Unmerging", unmerges.lines, ("unmerges",)),
    Section("migrations", "Migrations", migrations.lines, ("migrations",), migrations.charts),
    Section("locks", "Locks", locks.lines, ("contention", "lookups", "walks"), locks.charts),
    Section("races", "Races", races.lines, ("races",)),
    Section(
        "costs",
        "Costs",
        costs.lines,
        (
            *("cow", "cow_delays", "unmerges", "swap_ins", "undone_merges", "splits"),
            *("migrations", "profit"),
        ),
        costs.charts,
    ),
    Section("processes", "Processes", processes.lines, ("processes",), processes.charts),
    Section("sharing", "Who shares with whom", sharing.lines, ("processes",), sharing.charts),
    Section(
        "counters",
        "Counters against events",
        counters.lines,
        ("counters", "history"),
        counters.charts,
    ),
    Section("calls", "Functions with programs", calls.lines, ("calls",), calls.charts),
    Section("events", "Events", events.lines, ("events", "rungs")),
    Section("not_visible", "Not visible", not_visible.lines, ("not_visible",)),
)
"""In the order in which the report prints them."""
