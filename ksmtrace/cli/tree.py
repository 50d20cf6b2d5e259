"""``ksmtrace tree``: who shares what, now or at any time of a recording; and a page's history."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksmtrace.cli.page_history import show_history
from ksmtrace.cli.times import Time, moment_ns
from ksmtrace.cli.tree_text import TOP, tree_lines
from ksmtrace.errors import UsageError

if TYPE_CHECKING:
    from ksmtrace.reconstruct.state import TreeState
    from ksmtrace.stream import Header


class PageAddress(click.ParamType[tuple[int, int]]):
    """PID:ADDR, the address in hexadecimal."""

    name = "pid:addr"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse ``1234:7f0000001000``."""
        if isinstance(value, tuple):
            return value
        text, _, digits = value.partition(":")
        try:
            pid, address = int(text), int(digits, 16)
        except ValueError:
            pid = address = -1
        if pid < 0 or not 0 <= address < 1 << 64:
            self.fail(f"{value!r} is no page; write for example 1234:7f5e00001000", param, ctx)
        return pid, address


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path, readable=False))
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
@click.option("--top", type=click.IntRange(min=0), help=f"Rows per table.  [default: {TOP}]")
@click.option("--address", type=PageAddress(), help="The history of this page of a process.")
@click.option(
    "--pfn", type=click.IntRange(0, (1 << 64) - 1), help="The history of this page frame."
)
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
    """Show who shares what: the stable tree as it was at any time of a recording, or as it is.

    Without FILE that is what the running kernel's memory holds; where that cannot be read, the
    KSM pages that mergeable memory maps. Root can read either.

    \b
    Example:
      ksmtrace tree
      ksmtrace tree host.ksmt
      ksmtrace tree host.ksmt --at 12.5 --by process
      ksmtrace tree host.ksmt --address 1234:7f5e00001000
      ksmtrace tree host.ksmt --json | jq '.stable_nodes[0].sharers'
      ksmtrace tree host.ksmt --verify
    """
    if verify:
        given = {"--at": at, "--by": by, "--top": top, "--address": address, "--pfn": pfn}
        for option, value in given.items():
            if value is not None:
                raise UsageError(
                    f"--verify compares every reading, whole, and takes no {option}",
                    f"leave {option} out",
                )
        context.exit(_verify(file, as_json))
    if file is None:
        for option, value in (("--at", at), ("--address", address), ("--pfn", pfn)):
            if value is not None:
                raise UsageError(
                    f"{option} asks for what was, and that takes a recording",
                    "make one with `ksmtrace record`, and give its file",
                )
        _show_live(as_json, by, top)
        return
    from ksmtrace.recording.reader import RecordingReader

    if address is not None and pfn is not None:
        raise UsageError("--address and --pfn ask for two histories", "give one of them")
    reader = RecordingReader(file)
    if address is not None or pfn is not None:
        if at is not None or by is not None or top is not None:
            raise UsageError("a history is not cut", "leave --at, --by and --top out")
        show_history(file, reader, address, pfn, as_json)
        return

    from ksmtrace.cli.waiting import Waiting
    from ksmtrace.reconstruct.replay import Replay
    from ksmtrace.stream import time_of

    at_ns = None
    with Waiting(f"reading {file}"):
        # All of it: where it is damaged is to be said whatever time is asked about.
        end_ns = max([reader.header.started_ns, *map(time_of, reader)])
        if at is not None:
            at_ns = moment_ns(file, at, reader.header.started_ns, end_ns)
        state = Replay(lambda: RecordingReader(file)).state_at(at_ns)
    _show(file, reader.header, state, as_json, by, top, reader.cut_off)


def _show_live(as_json: bool, by: str | None, top: int | None) -> None:
    from ksmtrace.cli.waiting import Waiting
    from ksmtrace.reconstruct.live import read_live_tree

    with Waiting() as waiting:
        header, state = read_live_tree(waiting.show)
    _show(None, header, state, as_json, by, top, None)


def _show(
    file: Path | None,
    header: Header,
    state: TreeState,
    as_json: bool,
    by: str | None,
    top: int | None,
    cut_off: str | None,
) -> None:
    from ksmtrace.reconstruct.content import make_content

    if as_json:
        click.echo(json.dumps({**make_content(header, state, top), "cut_off": cut_off}))
        return
    for line in tree_lines(file, header, state, by, top, cut_off):
        click.echo(line)


def _verify(file: Path | None, as_json: bool) -> int:
    from ksmtrace.cli import verify

    cut_off = None
    if file is None:
        entries = verify.verify_live()
    else:
        entries, cut_off = verify.verify_recording(file)
    if as_json:
        click.echo(json.dumps({"verify": entries, "cut_off": cut_off}))
    else:
        click.echo("\n".join(verify.verify_lines(entries, cut_off)))
    return 1 if verify.nr_contradictions(entries) else 0
