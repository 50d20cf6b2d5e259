"""A widget of lines that is drawn anew, and laid out anew, only where they have changed."""

from __future__ import annotations

from collections.abc import Sequence

from textual.widgets import Static

from .draw import Line, as_content, width_of


class Lines(Static):
    """Shows lines; what is too long for one row is wrapped."""

    _lines: Sequence[Line] | None = None

    def show(self, lines: Sequence[Line]) -> None:
        """Take over lines."""
        before, self._lines = self._lines, lines
        if lines == before:
            return
        # To lay out the screen takes longer than to draw it.
        stays = before is not None and len(lines) == len(before)
        stays = stays and not (self._wraps(lines) or self._wraps(before or ()))
        self.update(as_content(lines), layout=not stays)

    def _wraps(self, lines: Sequence[Line]) -> bool:
        return any(width_of(line) > self.size.width for line in lines)
