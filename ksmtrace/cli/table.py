"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence


def render_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = ()
) -> Iterator[str]:
    """Yield the lines of a table: columns as wide as they need, two spaces apart.

    Args:
        heads: column headings; none of them non-empty leaves the heading out.
        rows: cells as text.
        left: indexes of columns set flush left; the others are set flush right.
    """
    lines = [*([heads] if any(heads) else []), *rows]
    if not lines:
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
