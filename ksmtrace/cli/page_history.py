"""The history of one page: what ``ksmtrace tree --address`` and ``--pfn`` print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksmtrace.cli.table import indent, render_table
from ksmtrace.units import text_duration

if TYPE_CHECKING:
    from ksmtrace.events import Events
    from ksmtrace.reconstruct.history import PageHistory
    from ksmtrace.recording.reader import RecordingReader
    from ksmtrace.stream import Header


def show_history(
    file: Path,
    reader: RecordingReader,
    address: tuple[int, int] | None,
    pfn: int | None,
    as_json: bool,
) -> None:
    """Print the history of a page of a process, (pid, address), or of a page frame."""
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
                    "cut_off": reader.cut_off,
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
    for line in _history_lines(file, reader.header, history, of, names, losses, reader.cut_off):
        click.echo(line)


def _history_lines(
    file: Path,
    header: Header,
    history: PageHistory,
    of: str,
    names: dict[int, str],
    losses: dict[str, int],
    cut_off: str | None,
) -> Iterator[str]:
    from ksmtrace.events import KIND_BY_NUMBER

    yield f"{file}: {of}"
    if losses:
        total = sum(losses.values())
        yield f"INCOMPLETE: {total:,} events of the recording are lost; some may belong here"
    if cut_off is not None:
        yield f"INCOMPLETE: {cut_off}"
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
    yield from indent(render_table(heads, rows, (1, 2, 3, 4)))


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
        frame = f"frame {event['pfn']}: " if event["pfn"] else ""
        before, after = (_tree(int(event[name])) for name in ("flags_before", "address"))
        return f"{frame}{before} -> {after}{changed}"
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
