"""A reconstruction as JSON, and the tables that people ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ksmtrace.reconstruct.columns import Array
from ksmtrace.reconstruct.state import ItemState, TreeState, World
from ksmtrace.stream import Header

COUNTERS = (
    *("pages_shared", "pages_sharing", "pages_unshared"),
    *("stable_node_chains", "stable_node_dups"),
)
"""The kernel's counters that the totals are named after (/sys/kernel/mm/ksm)."""

_STATES = {state: state.name.lower() for state in ItemState}


@dataclass(frozen=True)
class ProcessRow:
    """One mm with rmap_items, and what it shares.

    Attributes:
        pid: tgid of its owner, None unknown.
        mm: its address.
        comm, guest: who that is, None unknown.
        exited: whether it has left; its rmap_items stay until ksmd comes by.
        sharers: its pages that share a stable_node.
        nodes: the stable_nodes that these share.
        shared_with_others: those of the pages whose node a page of another mm shares as well.
        alone: those that are their node's only sharer.
        unstable, none: its rmap_items in the unstable tree, and in no tree as ksmd left them.
        zero_pages_placed: pages replaced by the zero page.
    """

    pid: int | None
    mm: int
    comm: str | None
    guest: str | None
    exited: bool
    sharers: int
    nodes: int
    shared_with_others: int
    alone: int
    unstable: int
    none: int
    zero_pages_placed: int

    @property
    def name(self) -> str:
        """What people call it: the guest's name, else comm, else its pid."""
        if self.guest:
            return f"guest {self.guest}"
        return self.comm or (f"pid {self.pid}" if self.pid else "unknown")


def make_content(header: Header, state: TreeState, top: int | None = None) -> dict[str, Any]:
    """Say everything that a state holds in plain JSON types.

    Args:
        header: the stream's.
        state: the state.
        top: only so many stable_nodes, those with the most sharers.
    """
    by_sharers = order_by_sharers(state)[:top]
    knows_trees = state.world.has_nodes
    sample = state.sample
    return {
        "kernel": {"release": release_of(header)},
        "started_ns": header.started_ns,
        "at_ns": state.at_ns,
        "world": state.world.name.lower(),
        "complete": not state.incomplete and state.older is None and state.world != World.MAPPED,
        "older": None if state.older is None else asdict(state.older),
        "incomplete": [asdict(reason) for reason in state.incomplete],
        "not_visible": list(state.not_visible),
        "totals": asdict(state.totals),
        "counters": None
        if sample is None
        else {"sampled_ns": sample.begin_ns, **{name: sample.ksm.get(name) for name in COUNTERS}},
        "scan": asdict(state.scan),
        "stable_nodes": _nodes(state, by_sharers),
        "chains": None
        if not knows_trees
        else [
            {
                "chain": f"{row['chain']:#x}",
                "nid": _known(row["nid"]),
                "dups": int(row["dups"]),
                "born_ns": int(row["born_ns"]) or None,
                "before_recording": bool(row["before_recording"]),
            }
            for row in state.chains
        ],
        "unstable_rmap_items": None
        if not knows_trees
        else [
            {
                **_place(state, row),
                "seqnr": int(row["seqnr"]),
                "age": int(row["age"]),
                "since_ns": int(row["since_ns"]) or None,
            }
            for row in state.rmap_items[state.rmap_items["state"] == ItemState.UNSTABLE]
        ],
        "processes": [
            {
                **asdict(row),
                "mm": _mm(state, row.mm),
                "unstable": None if state.totals.pages_unshared is None else row.unstable,
                "none": row.none if knows_trees else None,
                "zero_pages_placed": None
                if state.totals.zero_pages_placed is None
                else row.zero_pages_placed,
            }
            for row in find_processes(state)
        ],
    }


def release_of(header: Header) -> str | None:
    """Return the kernel's release, as `uname -r`."""
    release = (header.facts.get("kernel") or {}).get("release")
    return str(release) if release else None


def order_by_sharers(state: TreeState) -> Array:
    """Return the rows of ``stable_nodes``, most sharers first, shape (n,)."""
    return np.argsort(-state.stable_nodes["sharers"].astype(np.int64), kind="stable")


def sharers_of(state: TreeState) -> tuple[Array, Array]:
    """Return the sharers by nodes, and where each node's begin among them, shape (nodes + 1,)."""
    sharers = state.sharers()
    bounds = np.searchsorted(sharers["stable_node"], np.arange(len(state.stable_nodes) + 1))
    return sharers, bounds


def find_processes(state: TreeState) -> list[ProcessRow]:
    """List the mms that have rmap_items, most sharers first."""
    items, slots = state.rmap_items, state.mm_slots
    mms = np.unique(items["mm"])
    at = np.searchsorted(mms, items["mm"])
    slot_at = {int(mm): index for index, mm in enumerate(slots["mm"])}
    shares = items["stable_node"] >= 0
    nodes, owners = items["stable_node"][shares], at[shares]
    total = np.bincount(nodes, minlength=len(state.stable_nodes))
    step = max(len(mms), 1)
    own, counts = np.unique(nodes * step + owners, return_counts=True)
    own_nodes, own_mms = own // step, own % step
    # A node's sharers that are not of the mm itself.
    others = total[own_nodes] > counts
    columns = {
        "sharers": np.bincount(owners, minlength=len(mms)),
        "nodes": np.bincount(own_mms, minlength=len(mms)),
        "shared_with_others": np.bincount(own_mms, others * counts, minlength=len(mms)),
        "alone": np.bincount(own_mms, total[own_nodes] == 1, minlength=len(mms)),
        "unstable": np.bincount(at, items["state"] == ItemState.UNSTABLE, minlength=len(mms)),
        "none": np.bincount(at, items["state"] == ItemState.NONE, minlength=len(mms)),
    }
    rows = []
    for index, mm in enumerate(mms.tolist()):
        slot = slots[slot_at[mm]]
        who = _who(state, int(slot["pid"]), slot["comm"])
        counted: dict[str, Any] = {name: int(values[index]) for name, values in columns.items()}
        rows.append(
            ProcessRow(
                mm=mm,
                exited=bool(slot["exited_ns"]),
                zero_pages_placed=int(slot["zero_pages_placed"]),
                **who,
                **counted,
            )
        )
    return sorted(rows, key=lambda row: -row.sharers)


def find_sharing(state: TreeState, most: int) -> tuple[list[int], Array]:
    """Count who shares with whom.

    Args:
        state: the state.
        most: so many mms at most, those with the most sharers.

    Returns:
        The mms, and of shape (m, m) per mm how many of its pages share a node with a page of each
        of them; with itself, with another page of its own.
    """
    sharers = state.sharers()
    mms, counts = np.unique(sharers["mm"], return_counts=True)
    chosen = mms[np.argsort(-counts, kind="stable")[:most]]
    pages = np.zeros((len(chosen), len(state.stable_nodes)), np.int64)
    for index, mm in enumerate(chosen):
        nodes = sharers["stable_node"][sharers["mm"] == mm]
        pages[index] = np.bincount(nodes, minlength=pages.shape[1])
    shared = pages @ (pages > 0).astype(np.int64).T
    np.fill_diagonal(shared, (pages * (pages > 1)).sum(axis=1))
    return chosen.tolist(), shared


def _nodes(state: TreeState, rows: Array) -> list[dict[str, Any]]:
    sharers, bounds = sharers_of(state)
    nodes = []
    for index in rows.tolist():
        row = state.stable_nodes[index]
        nodes.append(
            {
                "stable_node": f"{row['stable_node']:#x}" if row["stable_node"] else None,
                "generation": int(row["generation"]),
                "kpfn": int(row["kpfn"]),
                "nid": _known(row["nid"]),
                "tree_nid": _known(row["tree_nid"]),
                "chain": f"{row['chain']:#x}" if row["chain"] else None,
                "placed": bool(row["placed"]) if state.world.has_nodes else None,
                "born_ns": int(row["born_ns"]) or None,
                "before_recording": bool(row["before_recording"]),
                "unseen_sharers": bool(row["unseen_sharers"]),
                "moved": int(row["moved"]) if state.world == World.FUNCTIONS else None,
                "sharers": [
                    {
                        **_place(state, sharer),
                        "since_ns": int(sharer["since_ns"]) or None,
                        "before_recording": bool(sharer["before_recording"]),
                    }
                    for sharer in sharers[bounds[index] : bounds[index + 1]]
                ],
            }
        )
    return nodes


def _place(state: TreeState, item: Any) -> dict[str, Any]:
    pid = int(item["pid"])
    seen = state.processes.get(pid)
    return {
        "pid": pid or None,
        "comm": seen.comm if seen else None,
        "guest": seen.guest if seen else None,
        "address": f"{item['address']:#x}",
        "mm": _mm(state, item["mm"]),
        "rmap_item": f"{item['rmap_item']:#x}" if item["rmap_item"] else None,
    }


def _mm(state: TreeState, mm: int) -> str | None:
    return None if state.world == World.MAPPED else f"{mm:#x}"


def _who(state: TreeState, pid: int, comm: bytes) -> Mapping[str, Any]:
    seen = state.processes.get(pid)
    told = comm.decode(errors="replace") or None
    return {
        "pid": pid or None,
        "comm": (seen.comm if seen else None) or told,
        "guest": seen.guest if seen else None,
    }


def _known(nid: Any) -> int | None:
    return int(nid) if nid >= 0 else None
