"""KSM pages that moved to other page frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from ksmtrace.analysis.addresses import number_lives, places_of
from ksmtrace.analysis.calls import Durations, durations_of
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.events import of_kind, select

_MOST_NODES = 5


@dataclass(frozen=True)
class Route:
    """Pages that moved from one NUMA node to another, or within one; None: unknown node."""

    from_node: int | None
    to_node: int | None
    pages: int


@dataclass(frozen=True)
class Mover:
    """A stable_node whose page moved: its address, the page frame it is at now, how often."""

    stable_node: int
    pfn: int
    moves: int


@dataclass(frozen=True)
class Unmapped:
    """KSM pages whose mappings were taken away to move them.

    Attributes:
        pages: how many.
        duration: how long until they were mapped again: accesses to them waited meanwhile.
        median_sharers, most_sharers: sharers of their stable_nodes, who all waited.
    """

    pages: int
    duration: Durations | None
    median_sharers: int
    most_sharers: int


@dataclass(frozen=True)
class Migrations:
    """The calls of mm/ksm.c:ksm_migrate_page (since 5.17 folio_migrate_ksm) for KSM pages.

    Attributes:
        pages: how many moved.
        left_behind: those whose stable_node.kpfn was not the new frame's as the function
            returned; None where the frames' numbers are unknown.
        routes: by NUMA node, most pages first.
        stable_nodes: how many stable_nodes they belonged to; a node's address may be used again
            after it was freed, and then counts once more.
        busiest: the stable_nodes that moved most often.
        unmapped: None where that was not caught, or there was none.
    """

    pages: int
    left_behind: int | None
    routes: list[Route]
    stable_nodes: int
    busiest: list[Mover]
    unmapped: Unmapped | None


def find_migrations(recorded: Recorded) -> Migrations | None:
    """Gather the moves; None where they were not caught."""
    if not recorded.can_see("ksm_migrate_page"):
        return None
    places = places_of(recorded.events, "ksm_migrate_page")
    moves = select(recorded.events, places)
    frames_known = recorded.has_field("ksm_migrate_page", "new_pfn")
    behind = int(np.count_nonzero(moves["kpfn_after"] != moves["new_pfn"]))
    freed = places_of(recorded.events, "remove_node_from_stable_tree")
    lives = number_lives(recorded.events, "stable_node", places, freed)
    # The last move of each life, counted backwards: np.unique returns the first one.
    _, last, counts = np.unique(lives[::-1], return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MOST_NODES]
    return Migrations(
        pages=len(moves),
        left_behind=behind if frames_known else None,
        routes=_routes(recorded, moves["pfn"], moves["new_pfn"]) if frames_known else [],
        stable_nodes=len(counts),
        busiest=[
            Mover(int(move["stable_node"]), int(move["kpfn_after"]), int(count))
            for move, count in zip(moves[::-1][last[order]], counts[order], strict=True)
        ],
        unmapped=_unmapped(recorded),
    )


def _unmapped(recorded: Recorded) -> Unmapped | None:
    events = of_kind(recorded.events, "remove_migration_ptes")
    if not len(events):
        return None
    return Unmapped(
        pages=len(events),
        duration=durations_of(events),
        median_sharers=int(np.median(events["sharers"])),
        most_sharers=int(events["sharers"].max()),
    )


def df_moves(recorded: Recorded) -> pd.DataFrame:
    """List the KSM pages whose mappings were taken away to move them, by time."""
    events = of_kind(recorded.events, "remove_migration_ptes")
    ranges = recorded.header.facts.get("node_pages") or {}
    columns = {
        "ts_ns": events["ts_ns"],
        "task_pid": events["task_pid"],
        "pfn": events["pfn"],
        "new_pfn": events["new_pfn"],
        "from_node": nodes_of(ranges, events["pfn"]),
        "to_node": nodes_of(ranges, events["new_pfn"]),
        "sharers": events["sharers"],
        "duration_ns": events["duration_ns"],
    }
    return pd.DataFrame({name: column.astype(np.int64) for name, column in columns.items()})


def _routes(
    recorded: Recorded, old: npt.NDArray[np.uint64], new: npt.NDArray[np.uint64]
) -> list[Route]:
    ranges = recorded.header.facts.get("node_pages") or {}
    pairs = np.c_[nodes_of(ranges, old), nodes_of(ranges, new)]
    routes, counts = np.unique(pairs, axis=0, return_counts=True)
    found = [
        Route(None if old_node < 0 else old_node, None if new_node < 0 else new_node, pages)
        for (old_node, new_node), pages in zip(routes.tolist(), counts.tolist(), strict=True)
    ]
    return sorted(found, key=lambda route: -route.pages)


def nodes_of(
    ranges: Mapping[str, Sequence[Sequence[int]]], pfns: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Return the NUMA node of each page frame, -1 where unknown.

    Args:
        ranges: per node its page frames as [first, end), which do not overlap.
        pfns: page frame numbers, shape (n,).
    """
    spans = sorted(
        (first, end, int(node)) for node, spans in ranges.items() for first, end in spans
    )
    if not spans:
        return np.full(len(pfns), -1)
    firsts, ends, nodes = np.array(spans, np.int64).T
    at = np.searchsorted(firsts, pfns.astype(np.int64), side="right") - 1
    inside = (at >= 0) & (pfns < ends[at].astype(np.uint64))
    return np.where(inside, nodes[at], -1)
