"""Tables and paragraphs as plain text."""

from __future__ import annotations

import contextlib
import contextvars
import shutil
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence

_columns: contextvars.ContextVar[int | None] = contextvars.ContextVar("columns", default=None)


@contextlib.contextmanager
def columns(number: int) -> Iterator[None]:
    """Break texts at so many columns, whatever the terminal has."""
    token = _columns.set(number)
    try:
        yield
    finally:
        _columns.reset(token)


def render_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = ()
) -> Iterator[str]:
    """Yield the lines of a table: columns as wide as they need, two spaces apart.

    Args:
        heads: column headings; none of them non-empty leaves the heading out.
        rows: cells as text.
        left: indexes of columns set flush left; the others are set flush right.
    """
    lines = [*([heads] if any(heads) else []), *([*map(printable, row)] for row in rows)]
    if not lines:
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def printable(text: str) -> str:
    """Write out what a terminal would obey: a process may call itself anything."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def indent(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines two columns further right."""
    for line in lines:
        yield f"  {line}"


def wrap(text: str, first: str, following: str) -> list[str]:
    """Break a text at the terminal's width, or at the columns that were asked for.

    Args:
        text: one paragraph.
        first: what its first line begins with.
        following: what every other line begins with.
    """
    width = _columns.get() or shutil.get_terminal_size((100, 24)).columns
    return textwrap.wrap(
        printable(text),
        width=max(width, 60),
        initial_indent=first,
        subsequent_indent=following,
        break_on_hyphens=False,
    )
