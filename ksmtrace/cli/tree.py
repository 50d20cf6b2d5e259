"""``ksmtrace tree``: who shares what, at any time of a recording; and the history of one page."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksmtrace.cli.table import render_table
from ksmtrace.errors import UsageError
from ksmtrace.units import text_duration

if TYPE_CHECKING:
    from ksmtrace.events import Events
    from ksmtrace.reconstruct.content import ProcessRow
    from ksmtrace.reconstruct.history import PageHistory
    from ksmtrace.reconstruct.state import TreeState
    from ksmtrace.stream import Header

_TOP = 10
_MOST_PROCESSES = 12
_MOST_NAMES = 3


class Time(click.ParamType[float]):
    """Seconds since the recording began, or -N: seconds before its end."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse ``12.5`` or ``-3``; ``-0`` is the end."""
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is no time; write for example 12.5, or -3 for 3 s before the end")


class PageAddress(click.ParamType[tuple[int, int]]):
    """PID:ADDR, the address in hexadecimal."""

    name = "pid:addr"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse ``1234:7f0000001000``."""
        if isinstance(value, tuple):
            return value
        pid, _, address = value.partition(":")
        try:
            return int(pid), int(address, 16)
        except ValueError:
            self.fail(f"{value!r} is no page; write for example 1234:7f5e00001000", param, ctx)


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--verify",
    is_flag=True,
    help="Compare with what the kernel held: at each moment of the recording at which that was "
    "read (record --witnesses); without FILE, what can be read of the running kernel now.",
)
@click.option("--at", type=Time(), help="Seconds since the recording began; -N: before its end.")
@click.option("--json", "as_json", is_flag=True, help="Everything, exactly, as one JSON object.")
@click.option(
    "--by",
    type=click.Choice(["node", "process", "chain", "nid"]),
    help="Only that table, whole.",
)
@click.option("--top", type=click.IntRange(min=0), help=f"Rows per table.  [default: {_TOP}]")
@click.option("--address", type=PageAddress(), help="The history of this page of a process.")
@click.option("--pfn", type=click.IntRange(min=0), help="The history of this page frame.")
@click.pass_context
def tree(
    context: click.Context,
    file: Path | None,
    verify: bool,
    at: float | None,
    as_json: bool,
    by: str | None,
    top: int | None,
    address: tuple[int, int] | None,
    pfn: int | None,
) -> None:
    """Show who shares what: the stable tree as it was at any time of a recording.

    \b
    Example:
      ksmtrace tree host.ksmt
      ksmtrace tree host.ksmt --at 12.5 --by process
      ksmtrace tree host.ksmt --address 1234:7f5e00001000
      ksmtrace tree host.ksmt --json | jq '.stable_nodes[0].sharers'
      ksmtrace tree host.ksmt --verify
    """
    if verify:
        context.exit(_verify(file, as_json))
    if file is None:
        raise UsageError(
            "which recording?", "make one with `ksmtrace record`, and give its file; or --verify"
        )
    from ksmtrace.recording.reader import RecordingReader

    if address is not None and pfn is not None:
        raise UsageError("--address and --pfn ask for two histories", "give one of them")
    reader = RecordingReader(file)
    if address is not None or pfn is not None:
        if at is not None or by is not None or top is not None:
            raise UsageError("a history is not cut", "leave --at, --by and --top out")
        _show_history(file, reader, address, pfn, as_json)
        return

    from ksmtrace.reconstruct.content import make_content
    from ksmtrace.reconstruct.replay import Replay

    at_ns = None if at is None else _moment(reader, at, file)
    state = Replay(lambda: RecordingReader(file)).state_at(at_ns)
    if as_json:
        click.echo(json.dumps(make_content(reader.header, state, top)))
        return
    for line in _lines(file, reader.header, state, by, top):
        click.echo(line)


def _verify(file: Path | None, as_json: bool) -> int:
    from ksmtrace.cli import verify

    entries = verify.verify_live() if file is None else verify.verify_recording(file)
    if as_json:
        click.echo(json.dumps({"verify": entries}))
    else:
        click.echo("\n".join(verify.verify_lines(entries)))
    return 1 if verify.nr_contradictions(entries) else 0


def _moment(reader: Any, at: float, file: Path) -> int:
    """Return the CLOCK_MONOTONIC that is meant."""
    from ksmtrace.stream import Batch, CounterSample, Losses, Trailer

    started_ns = int(reader.header.started_ns)
    end_ns = started_ns
    for item in reader:
        if isinstance(item, Batch) and len(item.events):
            end_ns = max(end_ns, int(item.events["ts_ns"].max()))
        elif isinstance(item, CounterSample):
            end_ns = max(end_ns, item.end_ns)
        elif isinstance(item, Losses | Trailer):
            end_ns = max(end_ns, item.ts_ns)
    from_end = str(at).startswith("-")
    at_ns = (end_ns if from_end else started_ns) + round(at * 1e9)
    if not started_ns <= at_ns <= end_ns:
        length = (end_ns - started_ns) / 1e9
        raise UsageError(
            f"{file} has no time {at:g}",
            f"it is {length:.3f} s long: give 0 to {length:.3f}, or -{length:.3f} to -0",
        )
    return at_ns


# ---- the state ----


def _lines(
    file: Path, header: Header, state: TreeState, by: str | None, top: int | None
) -> Iterator[str]:
    yield from _heading(file, header, state)
    yield ""
    yield from _totals(state)
    if by is None:
        sections = [_processes, _sharing, _nodes, _singletons, _chains, _numa]
    else:
        sections = [{"process": _processes, "node": _nodes, "chain": _chains, "nid": _numa}[by]]
    for section in sections:
        yield ""
        yield from section(header, state, top if top is not None or by is not None else _TOP)
    if state.not_visible:
        yield ""
        yield "NOT VISIBLE IN THIS RECORDING"
        for gap in state.not_visible:
            yield from _wrap(gap, "  - ", "    ")


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
            yield from _wrap(
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


def _totals(state: TreeState) -> Iterator[str]:
    from ksmtrace.reconstruct.content import COUNTERS
    from ksmtrace.reconstruct.state import World

    sample, totals = state.sample, state.totals
    yield "TREE"
    rows = []
    for name in COUNTERS:
        ours = getattr(totals, name)
        theirs = sample.ksm.get(name) if sample else None
        why = ""
        if name == "pages_sharing" and state.world == World.TRACEPOINTS:
            why = ": at most so many left singly, which has no event"
        difference = _difference(ours, theirs)
        rows.append(
            [
                name,
                _count(ours),
                _count(theirs),
                difference + (why if difference[:1] == "+" else ""),
            ]
        )
    ago = f" ({text_duration(state.at_ns - sample.begin_ns)} before)" if sample else ""
    yield from _indent(render_table(["", "by events", f"kernel's count{ago}", ""], rows, (0, 3)))
    if totals.empty_chains:
        yield (
            f"  {totals.empty_chains:,} more chains had no dups left: they may have been freed, "
            "which has no event"
        )
    if totals.unseen_sharers_nodes:
        yield (
            f"  {totals.unseen_sharers_nodes:,} stable nodes are older than the recording and may "
            "have sharers that no event names"
        )
    if totals.zero_pages_placed:
        yield f"  zero pages placed: {totals.zero_pages_placed:,}"
    scan = state.scan
    if scan.seqnr is not None:
        doing = f"pass {scan.seqnr} under way" if scan.running else f"{scan.seqnr} passes ended"
        yield f"  ksmd: {doing}; {scan.complete:,} seen from beginning to end"


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
            f"{row.zero_pages_placed:,}",
        ]
        for row in processes[:top]
    ]
    heads = ["pid", "who", "sharers", "stable nodes", "with others", "alone", "unstable", "zero"]
    if rows:
        yield from _indent(render_table(heads, rows, (1,)))
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
    yield from _indent(render_table(heads, rows, (0, 2)))
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
        yield from _indent(render_table(heads, rows, (3, 7)))
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
    sharers = state.stable_nodes["sharers"]
    known = ~state.stable_nodes["unseen_sharers"]
    alone = int(((sharers == 1) & known).sum())
    none = int(((sharers == 0) & known).sum())
    yield (
        f"SINGLETONS: {alone:,} stable nodes with one sharer (they save nothing), {none:,} without "
        "any (not yet freed)"
    )


def _chains(header: Header, state: TreeState, top: int | None) -> Iterator[str]:
    if state.totals.stable_node_chains is None:
        yield "CHAINS: not known of every stable node"
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
        yield from _indent(render_table(heads, rows))
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
                f"{np.count_nonzero(there['moved']):,}",
                f"{np.count_nonzero(~there['placed']):,}"
                if state.world == World.FUNCTIONS
                else "–",
            ]
        )
    if not rows:
        yield "  no stable nodes"
        return
    heads = ["nid", "stable nodes", "sharers", "moved", "tree unknown since a move"]
    yield from _indent(render_table(heads, rows))


def _since(header: Header, state: TreeState, ts_ns: int) -> str:
    return text_duration(state.at_ns - ts_ns) if ts_ns else "older"


# ---- the history of a page ----


def _show_history(
    file: Path, reader: Any, address: tuple[int, int] | None, pfn: int | None, as_json: bool
) -> None:
    from ksmtrace.events import KIND_BY_NUMBER
    from ksmtrace.reconstruct.history import frame_history, page_history
    from ksmtrace.stream import Batch, ProcessSeen

    names: dict[int, str] = {int(reader.header.facts.get("ksmd_pid") or 0): "ksmd"}
    losses: dict[str, int] = {}

    def batches() -> Iterator[Events]:
        for item in reader:
            if isinstance(item, Batch):
                yield item.events
            elif isinstance(item, ProcessSeen) and item.comm:
                names[item.pid] = item.comm
            elif hasattr(item, "dropped"):
                losses.update({kind: lost for kind, lost in item.dropped.items() if lost})

    if address is not None:
        history = page_history(reader.header, batches(), *address)
        of = f"page {address[1] & ~0xFFF:#x} of pid {address[0]}"
    else:
        assert pfn is not None
        history = frame_history(reader.header, batches(), pfn)
        of = f"page frame {pfn}"
    if as_json:
        click.echo(
            json.dumps(
                {
                    "started_ns": reader.header.started_ns,
                    "lost": losses,
                    "rmap_items": [f"{item:#x}" for item in history.rmap_items],
                    "stable_nodes": [f"{node:#x}" for node in history.stable_nodes],
                    "events": [
                        {
                            "ts_ns": int(event["ts_ns"]),
                            "event": KIND_BY_NUMBER[int(event["kind"])].name,
                            **_fields(event),
                        }
                        for event in history.events
                    ],
                }
            )
        )
        return
    for line in _history_lines(file, reader.header, history, of, names, losses):
        click.echo(line)


def _history_lines(
    file: Path,
    header: Header,
    history: PageHistory,
    of: str,
    names: dict[int, str],
    losses: dict[str, int],
) -> Iterator[str]:
    from ksmtrace.events import KIND_BY_NUMBER

    yield f"{file}: {of}"
    if losses:
        total = sum(losses.values())
        yield f"INCOMPLETE: {total:,} events of the recording are lost; some may belong here"
    if not len(history.events):
        yield "  no event touched it"
        return
    for label, found in (
        ("rmap_items", history.rmap_items),
        ("stable_nodes", history.stable_nodes),
    ):
        if found:
            yield f"  {label}: {', '.join(f'{one:x}' for one in found[:8])}"
    yield ""
    rows: list[list[str]] = []
    times = 1
    # A visit's time is that of its beginning, and what it led to comes before it in the ring.
    for event in history.events[history.events["ts_ns"].argsort(kind="stable")]:
        name = KIND_BY_NUMBER[int(event["kind"])].name
        pid = int(event["pid"])
        seconds = f"{(int(event['ts_ns']) - header.started_ns) / 1e9:.6f}"
        cells = [name, f"{names.get(pid, '?')} ({pid})", _detail(name, event)]
        if rows and rows[-1][1:4] == cells:
            times += 1
            rows[-1][4] = f"{times} times, the last at {seconds}"
        else:
            rows.append([seconds, *cells, ""])
            times = 1
    heads = ["seconds", "event", "process", "", ""]
    yield from _indent(render_table(heads, rows, (1, 2, 3, 4)))


def _fields(event: Any) -> dict[str, Any]:
    """Return the fields of one event, those of kernel addresses as hexadecimal text."""
    from ksmtrace.events import KIND_BY_NUMBER, EventFlag

    fields: dict[str, Any] = {"pid": int(event["pid"]), "err": int(event["err"])}
    fields["flags"] = [(flag.name or "").lower() for flag in EventFlag if event["flags"] & flag]
    for name in KIND_BY_NUMBER[int(event["kind"])].body:
        value = event[name]
        if isinstance(value, bytes):
            fields[name] = value.decode(errors="replace")
        elif name in ("mm", "rmap_item", "stable_node", "chain", "address", "ksm_page"):
            fields[name] = f"{value:#x}"
        else:
            fields[name] = int(value)
    return fields


def _detail(name: str, event: Any) -> str:
    from ksmtrace.events import EventFlag, SearchOutcome

    def flagged(flag: EventFlag) -> bool:
        return bool(event["flags"] & flag)

    err = int(event["err"])
    failed = f"failed ({err})" if err else "done"
    if name == "cmp_and_merge_page":
        changed = ", checksum changed" if event["checksum_changed"] else ""
        return (
            f"frame {event['pfn']}: {_tree(int(event['flags_before']))} -> "
            f"{_tree(int(event['address']))}{changed}"
        )
    if name == "stable_tree_search":
        outcome = SearchOutcome(int(event["outcome"])).name.lower()
        return f"frame {event['pfn']}: {outcome}, {event['nodes']} nodes looked up"
    if name == "ksm_merge_with_ksm_page":
        step = "becomes a KSM page" if not event["ksm_page"] else "merges with the KSM page"
        return f"{step} at frame {event['pfn']}: {failed}"
    if name == "ksm_merge_one_page":
        return f"is replaced by the zero page: {failed}"
    if name == "try_to_merge_one_page":
        return f"frame {event['pfn']}: {failed} in {text_duration(int(event['duration_ns']))}"
    if name == "break_ksm":
        return f"unmerged: {failed}"
    if name == "ksm_migrate_page":
        left = "" if event["kpfn_after"] == event["new_pfn"] else ", node left behind"
        return (
            f"node {event['stable_node']:x} moves: frame {event['pfn']} -> {event['new_pfn']}{left}"
        )
    if name == "stable_tree_insert":
        chain = f" in chain {event['chain']:x}" if event["chain"] else ""
        return f"node {event['stable_node']:x}{chain} at frame {event['pfn']}, tree {event['nid']}"
    if name == "stable_tree_append":
        first = ", its first" if flagged(EventFlag.FIRST_SHARER) else ""
        bypass = ", past max_page_sharing" if flagged(EventFlag.BYPASS) else ""
        return (
            f"becomes a sharer of node {event['stable_node']:x} at frame {event['pfn']}"
            f"{first}{bypass}"
        )
    if name == "remove_rmap_item_from_tree":
        last = ", its last sharer" if flagged(EventFlag.LAST_SHARER) else ""
        stale = ", which was stale and has been freed" if flagged(EventFlag.NODE_FREED) else ""
        return f"leaves node {event['stable_node']:x} at frame {event['pfn']}{last}{stale}"
    if name == "remove_node_from_stable_tree":
        return (
            f"node {event['stable_node']:x} at frame {event['pfn']} is freed with "
            f"{max(int(event['sharers']), 0)} sharers"
        )
    if name == "alloc_stable_node_chain":
        return f"node {event['stable_node']:x} becomes the first dup of chain {event['chain']:x}"
    if name == "free_stable_node_chain":
        return f"chain {event['chain']:x} is freed; node {event['stable_node']:x} takes its place"
    return f"frame {event['pfn']}"


def _tree(address: int) -> str:
    if address & 0x200:
        return "stable"
    return f"unstable (pass {address & 0xFF})" if address & 0x100 else "in no tree"


# ---- words ----


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


def _wrap(text: str, first: str, following: str) -> list[str]:
    width = shutil.get_terminal_size((100, 24)).columns
    return textwrap.wrap(
        text,
        width=max(width, 60),
        initial_indent=first,
        subsequent_indent=following,
        break_on_hyphens=False,
    )


def _indent(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield f"  {line}"
