"""The stable nodes, and their chains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .draw import (
    BOLD,
    MUTED,
    WARN,
    Line,
    Look,
    duration,
    line,
    wrapped,
)
from .happened import event_lines, event_row, tail_of
from .moment import Shown
from .tables import (
    Column,
    Row,
    Table,
    View,
    arranged,
    exactly,
    since_start,
    who,
    word,
)

if TYPE_CHECKING:
    from ksmtrace.reconstruct.state import TreeState


NODE_COLUMNS = (
    Column("kpfn", "kpfn", word, meaning="the KSM page's frame"),
    Column("sharers", "sharers", exactly, meaning="pages that share it"),
    Column("nid", "node", word, meaning="NUMA node of the frame"),
    Column("chain", "chain", word, right=False, meaning="the chain that it is a dup of"),
    Column("age_ns", "age", duration, meaning="since its first sharer"),
    Column("moved", "moved", exactly, meaning="how often its page moved to another frame"),
    Column("who", "who", word, right=False, meaning="who shares it, most pages first"),
)
CHAIN_COLUMNS = (
    Column("chain", "chain", word, right=False, meaning="address of the chain"),
    Column("dups", "dups", exactly, meaning="stable nodes in it"),
    Column("sharers", "sharers", exactly, meaning="pages that share one of them"),
    Column("nid", "node", word, meaning="NUMA node"),
    Column("age_ns", "age", duration, meaning="since it was made"),
)
TREE_VIEWS = ("nodes", "chains")


def trees(shown: Shown, view: View) -> Table:
    """List the stable nodes with the most sharers, or the chains."""
    columns = CHAIN_COLUMNS if view.by == "chains" else NODE_COLUMNS
    picture = shown.picture
    if picture is None or picture.trees is None:
        return Table(columns, empty=f"starting: {shown.says}")
    from ksmtrace.reconstruct.state import World

    state = picture.trees.state
    if view.by == "chains":
        empty = "no chain"
        if state.totals.stable_node_chains is None and state.world != World.FUNCTIONS:
            empty = "chains are not visible on this kernel"
        table = arranged(columns, _chains(state), view, empty)
        return table
    functions = state.world == World.FUNCTIONS
    rows = []
    for at, owners in zip(picture.trees.most_shared.tolist(), picture.trees.owners, strict=True):
        node = state.stable_nodes[at]
        born_ns = int(node["born_ns"])
        rows.append(
            Row(
                node_key(node),
                {
                    "kpfn": int(node["kpfn"]),
                    "sharers": int(node["sharers"]),
                    "nid": int(node["nid"]) if node["nid"] >= 0 else None,
                    "chain": f"{node['chain']:#x}" if node["chain"] else None,
                    "age_ns": state.at_ns - born_ns if born_ns else None,
                    "moved": int(node["moved"]) if functions else None,
                    "who": ", ".join(f"{who(picture, pid)} {pages:,}" for pid, pages in owners),
                },
            )
        )
    empty = "no stable node is known"
    if state.world == World.NONE:
        empty = "stable nodes are not visible on this kernel"
    table = arranged(columns, rows, view, empty)
    if view.search:
        return table
    return Table(table.columns, table.rows, len(state.stable_nodes), table.empty)


def node_key(node: Any) -> str:
    """Return what a stable node's row is known by."""
    return f"{int(node['stable_node']) or int(node['kpfn'])}.{int(node['generation'])}"


def _chains(state: TreeState) -> list[Row]:
    import numpy as np

    chains = state.chains[np.argsort(-state.chains["dups"].astype(np.int64), kind="stable")]
    known, at = np.unique(state.stable_nodes["chain"], return_inverse=True)
    sums = np.bincount(at, state.stable_nodes["sharers"], minlength=len(known)).astype(np.int64)
    sharers = dict(zip(known.tolist(), sums.tolist(), strict=True))
    rows = []
    for chain in chains:
        born_ns = int(chain["born_ns"])
        rows.append(
            Row(
                f"{int(chain['chain'])}.{int(chain['generation'])}",
                {
                    "chain": f"{chain['chain']:#x}",
                    "dups": int(chain["dups"]),
                    "sharers": sharers.get(int(chain["chain"]), 0),
                    "nid": int(chain["nid"]) if chain["nid"] >= 0 else None,
                    "age_ns": state.at_ns - born_ns if born_ns else None,
                },
            )
        )
    return rows


def node_detail(shown: Shown, key: str, look: Look) -> list[Line]:
    """Say who shares a stable node, and what happened to it."""
    import numpy as np

    picture = shown.picture
    if picture is None or picture.trees is None:
        return [line("the trees are put together", MUTED)]
    state = picture.trees.state
    at = next(
        (
            at
            for at in picture.trees.most_shared.tolist()
            if node_key(state.stable_nodes[at]) == key
        ),
        None,
    )
    if at is None:
        return [line("this stable node is gone, or no longer among the most shared", MUTED)]
    node = state.stable_nodes[at]
    born_ns = int(node["born_ns"])
    lines: list[Line] = [
        [
            (f"stable node at kpfn {int(node['kpfn']):,}", BOLD),
            (f"  {node['stable_node']:#x}" if node["stable_node"] else "", MUTED),
        ],
        [
            ("born ", MUTED),
            (since_start(born_ns or None, picture.header.started_ns, "before the stream"), ""),
            ("  NUMA node ", MUTED),
            (str(int(node["nid"])) if node["nid"] >= 0 else "unknown", ""),
            ("  chain ", MUTED),
            (f"{node['chain']:#x}" if node["chain"] else "none known", ""),
            ("  moved ", MUTED),
            (f"{int(node['moved']):,}×", ""),
        ],
    ]
    if node["unseen_sharers"]:
        lines.append(line("it may have sharers that no event has named", WARN))
    items = state.rmap_items
    sharers = items[items["stable_node"] == at]
    lines += [[], [("SHARERS", BOLD), (f"  {len(sharers):,}", "")]]
    for item in sharers[:100]:
        since = since_start(int(item["since_ns"]) or None, picture.header.started_ns, "unknown")
        lines.append(
            line(f"  {who(picture, int(item['pid'])):<28} {item['address']:#018x}  since {since}")
        )
    if len(sharers) > 100:
        lines.append(line(f"  ... and {len(sharers) - 100:,} more", MUTED))
    tail = tail_of(picture)
    at_frame = tail["pfn"] == node["kpfn"]
    if node["stable_node"]:
        at_frame |= tail["stable_node"] == node["stable_node"]
    rows = [event_row(picture, tail[index], int(index)) for index in np.flatnonzero(at_frame)[-40:]]
    lines += [[], [("HISTORY", BOLD), ("  among the last events kept, by frame and node", MUTED)]]
    lines += [one for row in rows for one in event_lines(row, look)]
    if not rows:
        lines.append(line("  none kept", MUTED))
    return lines


def tree_summary(shown: Shown, look: Look) -> list[Line]:
    """Say what the trees are like, above the table of nodes."""
    import numpy as np

    from ksmtrace.reconstruct.state import World

    picture = shown.picture
    if picture is None:
        return wrapped(f"starting: {shown.says}", look.width, BOLD)
    if picture.trees is None:
        return [line("the trees are put together", MUTED)]
    state = picture.trees.state
    if state.world == World.NONE:
        return wrapped("nothing is known of the trees on this kernel", look.width, MUTED)
    nodes = state.stable_nodes
    sharers = nodes["sharers"]
    single = int(np.count_nonzero(sharers == 1))
    known = (
        "by every join, departure and move"
        if state.world == World.FUNCTIONS
        else "by merges and freed nodes alone: sharers as of their merge"
    )
    lines: list[Line] = [
        [
            (f"{len(nodes):,} stable nodes", BOLD),
            (f" with {int(sharers.sum()):,} sharers, ", ""),
            (f"{single:,} with one alone", ""),
            (f"; known {known}", MUTED),
        ]
    ]
    if len(nodes):
        bounds = (1, 2, 3, 5, 9, 17, 65, 257)
        found, _ = np.histogram(sharers, [*bounds, np.iinfo(np.int64).max])
        labels = ("1", "2", "3-4", "5-8", "9-16", "17-64", "65-256", ">256")
        said = "  ".join(
            f"{label}: {n:,}" for label, n in zip(labels, found.tolist(), strict=True) if n
        )
        lines.append([("sharers per node  ", MUTED), (said, "")])
        nids, counts = np.unique(nodes["nid"], return_counts=True)
        split = ", ".join(
            f"{'unknown' if nid < 0 else f'node {nid}'}: {n:,}"
            for nid, n in zip(nids.tolist(), counts.tolist(), strict=True)
        )
        chains = state.totals.stable_node_chains
        dups = state.totals.stable_node_dups
        lines.append(
            [
                ("NUMA  ", MUTED),
                (split, ""),
                ("  chains  ", MUTED),
                ("not visible" if chains is None else f"{chains:,} with {dups or 0:,} dups", ""),
            ]
        )
    if state.older is not None:
        older = state.older
        lines += wrapped(
            f"older than the stream: {older.stable_nodes:,} nodes, {older.sharers:,} sharers; "
            f"known of them: {older.known_stable_nodes:,} and {older.known_sharers:,}",
            look.width,
            WARN,
        )
    for reason in state.incomplete[:1]:
        lines += wrapped(f"incomplete: {reason.why}", look.width, WARN)
    return lines
