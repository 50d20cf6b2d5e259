"""Sharers that left, and stable_nodes that were freed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.sections.words import MOST_NAMES, exact, name_of


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    removals = content["removals"]
    singly = next(
        (-e["difference"] for e in content["counters"]
         if e["counter"] == "pages_sharing" and e["verdict"] in ("explained", "exact")),
        None,
    )  # fmt: skip
    yield (
        f"REMOVALS: {exact(removals['stable_nodes_freed'])} stable nodes freed, "
        f"{exact(removals['sharers_removed_with_node'])} sharers removed with them (a node's last "
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
    names = {str(process["pid"]): name_of(process) for process in content["processes"]}
    most = list(single["by_pid"].items())
    if most:
        shown = [f"{names[pid]} ({pid}) {count:,}" for pid, count in most[:MOST_NAMES]]
        yield f"  from {', '.join(shown)}{' ...' if len(most) > MOST_NAMES else ''}"
