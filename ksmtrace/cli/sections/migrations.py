"""KSM pages that moved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Bars, Chart, Series


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
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


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield between which nodes pages moved."""
    migrations = content["migrations"]
    if migrations and migrations["routes"]:
        routes = migrations["routes"]
        yield Bars(
            "Moves of KSM pages, by NUMA node",
            "pages",
            [f"{_node(one['from_node'])} to {_node(one['to_node'])}" for one in routes],
            (Series("pages", [one["pages"] for one in routes]),),
        )
