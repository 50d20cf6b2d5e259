"""The trees as text: what ``ksmtrace tree`` prints of a state, table by table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksmtrace.cli.table import indent, render_table, wrap
from ksmtrace.units import text_duration

if TYPE_CHECKING:
    from ksmtrace.reconstruct.content import ProcessRow
    from ksmtrace.reconstruct.state import TreeState
    from ksmtrace.stream import Header

TOP = 10
_MOST_PROCESSES = 12
_MOST_NAMES = 3


def tree_lines(
    file: Path | None,
    header: Header,
    state: TreeState,
    by: str | None,
    top: int | None,
    cut_off: str | None = None,
) -> Iterator[str]:
    """Yield the lines of a state: of a recording, or, without ``file``, of the running kernel.

    Args:
        by: show the one table of "node", "process", "chain" or "nid", whole; None for all.
        top: rows per table; None for as many as there is room for at a glance.
        cut_off: why the recording ends before its time; None where it does not.
    """
    yield from _live_heading(header, state) if file is None else _heading(file, header, state)
    if cut_off is not None:
        yield from wrap(f"the recording itself is INCOMPLETE: {cut_off}", "  - ", "    ")
    yield ""
    yield from _totals(state)
    if by is None:
        sections = [_processes, _sharing, _nodes, _singletons, _chains, _numa]
    else:
        sections = [{"process": _processes, "node": _nodes, "chain": _chains, "nid": _numa}[by]]
    for section in sections:
        yield ""
        yield from section(header, state, top if top is not None or by is not None else TOP)
    if state.not_visible:
        yield ""
        yield "NOT VISIBLE HERE" if state.world.is_live else "NOT VISIBLE IN THIS RECORDING"
        for gap in state.not_visible:
            yield from wrap(gap, "  - ", "    ")


_BY_WORLD = {
    0: "nothing is known of the trees",
    1: "known by merges and freed stable_nodes alone: a sharer is one as of its merge",
    2: "known by every join, departure and move",
}


def _heading(file: Path, header: Header, state: TreeState) -> Iterator[str]:
    from ksmtrace.reconstruct.content import release_of

    at = text_duration(state.at_ns - header.started_ns)
    yield f"{file}: Linux {release_of(header)}, {at} after the recording began"
    if not state.incomplete:
        word = "COMPLETE" if state.older is None else "IN PART, as it is older than the recording"
        yield f"{word}; {_BY_WORLD[int(state.world)]}"
    else:
        since = text_duration(min(one.since_ns for one in state.incomplete) - header.started_ns)
        yield f"INCOMPLETE since {since}; {_BY_WORLD[int(state.world)]}"
        for reason in state.incomplete:
            yield from wrap(
                f"after {text_duration(reason.since_ns - header.started_ns)}: {reason.why}",
                "  - ",
                "    ",
            )

    if state.older is not None:
        older = state.older
        yield (
            f"  - when it began there were {older.stable_nodes:,} stable nodes with "
            f"{older.sharers:,} sharers; known of them by events since, and still there: "
            f"{older.known_stable_nodes:,} with {older.known_sharers:,}"
        )


def _live_heading(header: Header, state: TreeState) -> Iterator[str]:
    from ksmtrace.reconstruct.content import release_of
    from ksmtrace.reconstruct.state import World

    yield f"Linux {release_of(header)}, now"
    if state.world == World.MAPPED:
        yield from wrap(
            "IN PART: the KSM pages that mergeable memory maps, without the kernel's memory; a "
            "frame stands for its stable node here, and each place that maps it for a sharer",
            "",
            "",
        )
    elif not state.incomplete:
        yield "COMPLETE: what mm/ksm.c holds in the kernel's memory"
    else:
        yield "NOT OF ONE MOMENT: what mm/ksm.c holds in the kernel's memory"
        for reason in state.incomplete:
            yield from wrap(reason.why, "  - ", "    ")


def _totals(state: TreeState) -> Iterator[str]:
    from ksmtrace.reconstruct.content import COUNTERS
    from ksmtrace.reconstruct.state import World

    sample, totals = state.sample, state.totals
    yield "TREE"
    signs = ("+", "-") if state.world == World.MAPPED else ("+",)
    rows = []
    for name in COUNTERS:
        ours = getattr(totals, name)
        theirs = sample.ksm.get(name) if sample else None
        why = ""
        if name == "pages_sharing" and state.world == World.TRACEPOINTS:
            why = ": at most so many left singly, which has no event"
        elif state.world == World.MAPPED:
            why = ": the kernel counts as of ksmd's last visit to each page"
        difference = _difference(ours, theirs)
        rows.append(
            [
                name,
                _count(ours),
                _count(theirs),
                difference + (why if difference[:1] in signs else ""),
            ]
        )
    ago = ""
    if sample and not state.world.is_live:
        ago = f" ({text_duration(state.at_ns - sample.begin_ns)} before)"
    by = {World.MEMORY: "in memory", World.MAPPED: "mapped"}.get(state.world, "by events")
    yield from indent(render_table(["", by, f"kernel's count{ago}", ""], rows, (0, 3)))
    if totals.empty_chains:
        yield (
            f"  {totals.empty_chains:,} more chains had no dups left: they may have been freed, "
            "which has no event"
        )
    if totals.unseen_sharers_nodes:
        yield (
            f"  {totals.unseen_sharers_nodes:,} of these pages are mapped elsewhere as well"
            if state.world == World.MAPPED
            else f"  {totals.unseen_sharers_nodes:,} stable nodes are older than the recording and "
            "may have sharers that no event names"
        )
    if totals.zero_pages_placed:
        yield f"  zero pages placed: {totals.zero_pages_placed:,}"
    scan = state.scan
    if scan.seqnr is not None:
        doing = f"pass {scan.seqnr} under way" if scan.running else f"{scan.seqnr} passes ended"
        seen = "" if state.world.is_live else f"; {scan.complete:,} seen from beginning to end"
        yield f"  ksmd: {doing}{seen}"


def _difference(ours: int | None, theirs: Any) -> str:
    if ours is None or not isinstance(theirs, int):
        return ""
    return "equal" if ours == theirs else f"{ours - theirs:+,}"


def _processes(header: Header, state: TreeState, top: int | None) -> Iterator[str]:
    from ksmtrace.reconstruct.content import find_processes

    processes = find_processes(state)
    yield f"PROCESSES: {len(processes):,}"
    rows = [
        [
            _pid(row.pid),
            row.name + (" (exited)" if row.exited else ""),
            f"{row.sharers:,}",
            f"{row.nodes:,}",
            f"{row.shared_with_others:,}",
            f"{row.alone:,}",
            "–" if state.totals.pages_unshared is None else f"{row.unstable:,}",
            "–" if state.totals.zero_pages_placed is None else f"{row.zero_pages_placed:,}",
        ]
        for row in processes[:top]
    ]
    heads = ["pid", "who", "sharers", "stable nodes", "with others", "alone", "unstable", "zero"]
    if rows:
        yield from indent(render_table(heads, rows, (1,)))
    yield from _more(len(processes), top)


def _sharing(header: Header, state: TreeState, top: int | None) -> Iterator[str]:
    from ksmtrace.reconstruct.content import find_processes, find_sharing

    yield "WHO SHARES WITH WHOM"
    who = {row.mm: row for row in find_processes(state)}
    mms, shared = find_sharing(state, _MOST_PROCESSES)
    pairs = [
        (int(shared[a, b]), int(shared[b, a]), who[mms[a]], who[mms[b]])
        for a in range(len(mms))
        for b in range(a + 1, len(mms))
        if shared[a, b]
    ]
    if not pairs:
        yield "  nobody with anybody else"
        return
    pairs.sort(key=lambda pair: -pair[0])
    rows = [
        [_who(one), _part(ours, one), _who(other), _part(theirs, other)]
        for ours, theirs, one, other in pairs[:top]
    ]
    heads = ["who", "pages on nodes that both share", "and whom", "of these"]
    yield from indent(render_table(heads, rows, (0, 2)))
    yield from _more(len(pairs), top)


def _part(pages: int, row: ProcessRow) -> str:
    return f"{pages:,} of {row.sharers:,} ({pages / max(row.sharers, 1):.0%})"


def _nodes(header: Header, state: TreeState, top: int | None) -> Iterator[str]:
    from ksmtrace.reconstruct.content import order_by_sharers, sharers_of

    nodes = state.stable_nodes
    yield f"STABLE NODES: {len(nodes):,}, by sharers"
    sharers, bounds = sharers_of(state)
    rows = []
    for index in order_by_sharers(state)[:top].tolist():
        node = nodes[index]
        own = sharers[bounds[index] : bounds[index + 1]]
        rows.append(
            [
                f"{node['stable_node']:x}" if node["stable_node"] else "–",
                f"{node['kpfn']:,}",
                "–" if node["nid"] < 0 else str(node["nid"]),
                _chain_text(node),
                f"{'≥ ' if node['unseen_sharers'] else ''}{node['sharers']:,}",
                _since(header, state, int(node["born_ns"])),
                str(node["moved"]) if node["moved"] else "–",
                _names(state, own),
            ]
        )
    heads = ["stable_node", "kpfn", "nid", "chain", "sharers", "age", "moved", "whose"]
    if rows:
        yield from indent(render_table(heads, rows, (3, 7)))
    yield from _more(len(nodes), top)


def _chain_text(node: Any) -> str:
    if not node["placed"] and not node["chain"]:
        return "?"
    mark = "" if node["placed"] else "?"
    return f"{node['chain']:x}{mark}" if node["chain"] else "–"


def _names(state: TreeState, sharers: Any) -> str:
    import numpy as np

    pids, counts = np.unique(sharers["pid"], return_counts=True)
    most = np.argsort(-counts, kind="stable")
    shown = [
        f"{_name_of(state, int(pids[at]))} {counts[at]:,}" for at in most[:_MOST_NAMES].tolist()
    ]
    return ", ".join(shown) + (" ..." if len(pids) > _MOST_NAMES else "")


def _singletons(header: Header, state: TreeState, top: int | None) -> Iterator[str]:
    from ksmtrace.reconstruct.state import World

    sharers = state.stable_nodes["sharers"]
    known = ~state.stable_nodes["unseen_sharers"]
    alone = int(((sharers == 1) & known).sum())
    none = int(((sharers == 0) & known).sum())
    if state.world == World.MAPPED:
        yield f"SINGLETONS: {alone:,} stable nodes with one sharer (they save nothing)"
        return
    yield (
        f"SINGLETONS: {alone:,} stable nodes with one sharer (they save nothing), {none:,} without "
        "any (not yet freed)"
    )


def _chains(header: Header, state: TreeState, top: int | None) -> Iterator[str]:
    if state.totals.stable_node_chains is None:
        everything = " of every stable node" if state.world.has_nodes else ""
        yield f"CHAINS: not known{everything}"
        return
    chains = state.chains
    yield (
        f"CHAINS: {state.totals.stable_node_chains:,}, of {state.totals.stable_node_dups:,} "
        "stable nodes (dups)"
    )
    nodes = state.stable_nodes
    rows = []
    for row in chains[chains["dups"].astype(int).argsort(kind="stable")[::-1]][:top]:
        dups = nodes[nodes["chain"] == row["chain"]]
        rows.append(
            [
                f"{row['chain']:x}",
                "–" if row["nid"] < 0 else str(row["nid"]),
                f"{row['dups']:,}" if row["dups"] else "none left",
                f"{dups['sharers'].sum():,}",
                f"{dups['sharers'].max(initial=0):,}",
                _since(header, state, int(row["born_ns"])),
            ]
        )
    heads = ["chain", "nid", "dups", "sharers", "at most", "age"]
    if rows:
        yield from indent(render_table(heads, rows))
    yield from _more(len(chains), top)


def _numa(header: Header, state: TreeState, top: int | None) -> Iterator[str]:
    import numpy as np

    from ksmtrace.reconstruct.state import World

    nodes = state.stable_nodes
    nids = np.unique(nodes["nid"])
    yield "NUMA NODES, by where the KSM pages are"
    rows = []
    for nid in nids.tolist():
        there = nodes[nodes["nid"] == nid]
        rows.append(
            [
                "unknown" if nid < 0 else str(nid),
                f"{len(there):,}",
                f"{there['sharers'].sum():,}",
                "–" if state.world.is_live else f"{np.count_nonzero(there['moved']):,}",
                f"{np.count_nonzero(~there['placed']):,}"
                if state.world == World.FUNCTIONS
                else "–",
            ]
        )
    if not rows:
        yield "  no stable nodes"
        return
    heads = ["nid", "stable nodes", "sharers", "moved", "tree unknown since a move"]
    yield from indent(render_table(heads, rows))


def _since(header: Header, state: TreeState, ts_ns: int) -> str:
    if state.world.is_live:
        return "–"
    return text_duration(state.at_ns - ts_ns) if ts_ns else "older"


def _name_of(state: TreeState, pid: int) -> str:
    seen = state.processes.get(pid)
    if seen and seen.guest:
        return f"guest {seen.guest}"
    return (seen.comm if seen else None) or (f"pid {pid}" if pid else "unknown")


def _who(row: ProcessRow) -> str:
    return f"{row.name} ({_pid(row.pid)})"


def _pid(pid: int | None) -> str:
    return "–" if pid is None else str(pid)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _more(count: int, top: int | None) -> Iterator[str]:
    if top is not None and count > top:
        yield f"  ... and {count - top:,} more (--top shows more, --by all)"
