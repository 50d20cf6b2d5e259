"""A table widget that takes over a new moment in place: cursor and scrolling stay.

Lines are made when they are drawn, and only those that are on the screen.
"""

from __future__ import annotations

from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from .draw import BAD, GOOD, MUTED, WARN, Look
from .tables import Column, Row, Table

_CLASSES = {
    BAD: "listing--bad",
    GOOD: "listing--good",
    MUTED: "listing--muted",
    WARN: "listing--warn",
}


class Listing(ScrollView, can_focus=True):
    """Shows a :class:`ksmtrace.tui.tables.Table`."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("listing--head", "listing--odd", "listing--cursor"),
        *_CLASSES.values(),
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "open", show=False),
        Binding("up", "move(-1)", "up", show=False),
        Binding("down", "move(1)", "down", show=False),
        Binding("pageup", "page(-1)", "page up", show=False),
        Binding("pagedown", "page(1)", "page down", show=False),
        Binding("home,ctrl+home", "move(-1000000)", "first", show=False),
        Binding("end,ctrl+end", "move(1000000)", "last", show=False),
    ]

    class Opened(Message):
        """A row is to be opened."""

        def __init__(self, row: Row) -> None:
            super().__init__()
            self.row = row

    class HeadClicked(Message):
        """A column's heading was clicked on."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self.table = Table(())
        self.follows = False
        """Whether the cursor stays at the last row as rows are added."""
        self.cursor_row = 0
        self._heads: tuple[str, ...] = ()
        self._cells: tuple[tuple[str, ...], ...] = ()
        self._widths: tuple[int, ...] = ()

    def show(self, table: Table, look: Look, sort: str = "", reverse: bool = False) -> None:
        """Take over a table."""
        heads = tuple(_head(column, sort, reverse) for column in table.columns)
        cells = tuple(
            tuple(column.text(row.values.get(column.name), look) for column in table.columns)
            for row in table.rows
        )
        key, at_end = self.cursor_key, self.cursor_row >= self.row_count - 1
        same = cells == self._cells and heads == self._heads
        self.table, self._heads, self._cells = table, heads, cells
        if same:
            return
        columns = zip(heads, *cells, strict=True)
        self._widths = tuple(max(map(cell_len, texts)) for texts in columns)
        self.virtual_size = Size(sum(self._widths) + 2 * len(heads), len(cells) + 1)
        keys = [row.key for row in table.rows]
        if self.follows and at_end:
            self._put_cursor(len(keys) - 1)
        else:
            row = keys.index(key) if key in keys else min(self.cursor_row, len(keys) - 1)
            self.cursor_row = max(row, 0)
        self.refresh()

    # ---- the cursor ----

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self._cells)

    @property
    def cursor_data(self) -> Row | None:
        """The row that the cursor is on, None without rows."""
        rows = self.table.rows
        return rows[self.cursor_row] if self.cursor_row < len(rows) else None

    @property
    def cursor_key(self) -> str | None:
        """Key of the row that the cursor is on, None without rows."""
        row = self.cursor_data
        return None if row is None else row.key

    def _put_cursor(self, row: int) -> None:
        self.cursor_row = max(min(row, self.row_count - 1), 0)
        # What was just added can be scrolled to once it is laid out.
        self.call_after_refresh(self._show_cursor)
        self.refresh()

    def on_resize(self) -> None:
        """Keep the cursor on the screen."""
        self._show_cursor()

    def _show_cursor(self) -> None:
        # The heading hides one line of what is scrolled to.
        top = max(
            self.scroll_offset.y,
            self.cursor_row + 2 - max(self.scrollable_content_region.height, 2),
        )
        self.scroll_to(y=min(top, self.cursor_row), animate=False, immediate=True)

    def action_move(self, by: int) -> None:
        """Move the cursor by rows."""
        self._put_cursor(self.cursor_row + by)

    def action_page(self, by: int) -> None:
        """Move the cursor by what the screen holds."""
        self._put_cursor(self.cursor_row + by * max(self.scrollable_content_region.height - 2, 1))

    def action_open(self) -> None:
        """Open the row that the cursor is on."""
        row = self.cursor_data
        if row is not None:
            self.post_message(self.Opened(row))

    def on_click(self, event: Click) -> None:
        """Sort by a heading, go to a row, or open the one that the cursor is on."""
        at = event.get_content_offset(self)
        if at is None:
            return
        row = at.y - 1 + self.scroll_offset.y
        if at.y == 0:
            left = at.x + self.scroll_offset.x
            for column, width in zip(self.table.columns, self._widths, strict=True):
                left -= width + 2
                if left < 0:
                    self.post_message(self.HeadClicked(column.name))
                    return
        elif row == self.cursor_row:
            self.action_open()
        elif row < self.row_count:
            self._put_cursor(row)

    # ---- drawing ----

    def render_line(self, y: int) -> Strip:
        """Draw one line of the screen."""
        left, top = self.scroll_offset
        row, width = y - 1 + top, self.size.width
        if not y:
            style = self.get_component_rich_style("listing--head")
            strip = self._strip(self._heads, style)
        elif row < self.row_count:
            marked = self._marked(self.table.rows[row].style)
            if row == self.cursor_row:
                style = self.get_component_rich_style("listing--cursor")
            elif row % 2:
                style = self.get_component_rich_style("listing--odd") + marked
            else:
                style = self.rich_style + marked
            strip = self._strip(self._cells[row], style)
        else:
            return Strip.blank(width, self.rich_style)
        return strip.crop_extend(left, left + width, style)

    def _marked(self, mark: str) -> Style:
        if mark not in _CLASSES:
            return Style.null()
        colour = self.get_component_styles(_CLASSES[mark]).color.rich_color
        return Style(color=colour, bold=mark == BAD or None)

    def _strip(self, texts: tuple[str, ...], style: Style) -> Strip:
        said = []
        for column, text, width in zip(self.table.columns, texts, self._widths, strict=True):
            room = " " * (width - cell_len(text))
            said.append(f" {room}{text} " if column.right else f" {text}{room} ")
        line = "".join(said)
        return Strip([Segment(line, style)], cell_len(line))


def _head(column: Column, sort: str, reverse: bool) -> str:
    if column.name != sort:
        return column.title
    return f"{column.title} {'▲' if reverse else '▼'}"
