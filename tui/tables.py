"""What tables are made of: columns, rows, and how they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .draw import (
    Look,
)

if TYPE_CHECKING:
    from ksmtrace.analysis.live import Picture

MOST_ROWS = 200

Value = int | float | str | None


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its key in exports, with a unit where it has one.
        title: its heading.
        text: writes a value for people.
        right: whether it is set flush right.
        meaning: for the help.
    """

    name: str
    title: str
    text: Callable[[Any, Look], str]
    right: bool = True
    meaning: str = ""


@dataclass(frozen=True)
class Row:
    """One row: what it is known by, its exact values by column, and how it is marked."""

    key: str
    values: Mapping[str, Value]
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table at one moment.

    Attributes:
        columns: in order.
        rows: those that are shown, in order.
        nr_rows: how many there are in all.
        empty: what to say where there are none.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...] = ()
    nr_rows: int = 0
    empty: str = ""


@dataclass(frozen=True)
class View:
    """How a table is looked at.

    Attributes:
        sort: name of the column that orders it; "" for its own order.
        reverse: the other way round.
        search: only rows that hold all these words.
        by: how rows are put together; one of the table's ways.
        most: so many rows at most, None: all.
    """

    sort: str = ""
    reverse: bool = False
    search: str = ""
    by: str = ""
    most: int | None = MOST_ROWS


def word(value: Any, look: Look) -> str:
    """Write a text; None is a dash."""
    return "–" if value is None else str(value)


def or_dash(write: Callable[[Any, Look], str]) -> Callable[[Any, Look], str]:
    """Let a value that is not known be a dash."""
    return lambda value, look: "–" if value is None else write(value, look)


def exactly(value: Any, look: Look) -> str:
    """Write a number in full; None is a dash, and a text stands as it is."""
    if isinstance(value, str):
        return value
    return "–" if value is None else f"{value:,}"


def arranged(columns: tuple[Column, ...], rows: Sequence[Row], view: View, empty: str) -> Table:
    """Filter, sort and cut rows."""
    words = view.search.lower().split()
    if words:
        rows = [
            row
            for row in rows
            if all(
                any(one in str(value).lower() for value in row.values.values() if value is not None)
                for one in words
            )
        ]
        empty = f"nothing holds {view.search!r}"
    if view.sort:
        known = [row for row in rows if row.values.get(view.sort) is not None]
        unknown = [row for row in rows if row.values.get(view.sort) is None]
        numeric = all(not isinstance(row.values[view.sort], str) for row in known)
        known.sort(key=lambda row: _order(row.values[view.sort]), reverse=numeric != view.reverse)
        rows = [*known, *unknown]
    return Table(columns, tuple(rows[: view.most]), len(rows), empty)


def _order(value: Value) -> Any:
    return value.lower() if isinstance(value, str) else value


def since_start(ts_ns: int | None, started_ns: int, otherwise: str) -> str:
    """Write when something was, in seconds since the start."""
    return otherwise if ts_ns is None else f"{(ts_ns - started_ns) / 1e9:.3f} s"


def who(picture: Picture, pid: int) -> str:
    """Name a process by its pid."""
    seen = picture.names.get(pid)
    if not pid:
        return "unknown"
    if pid == picture.header.facts.get("ksmd_pid"):
        return "ksmd"
    if seen is None:
        return f"pid {pid}"
    return f"guest {seen.guest} ({pid})" if seen.guest else f"{seen.comm or '?'} ({pid})"
