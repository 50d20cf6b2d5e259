"""What opens over a screen: help, details, a line to type in, and what has to be confirmed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from .draw import MUTED, Line, as_content
from .lines import Lines

T = TypeVar("T")


class _Box(ModalScreen[T]):
    # A box over the screen, with a title; closes without an answer.

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "close", "close")]

    says_below: ClassVar[str] = ""
    is_small: ClassVar[bool] = False
    can_scroll: ClassVar[bool] = False

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    def compose(self) -> ComposeResult:
        """Build the box."""
        with VerticalScroll(classes="box small" if self.is_small else "box") as box:
            box.can_focus = self.can_scroll
            box.border_title = self._title
            box.border_subtitle = self.says_below
            yield from self.content()

    def content(self) -> Iterable[Widget]:
        """Return what is in the box."""
        raise NotImplementedError

    def action_close(self) -> None:
        """Close the box."""
        self.dismiss(None)


def width_of_box(width: int) -> int:
    """Return what a box has room for on a screen: 92% without border, padding, scroll bar."""
    return width * 92 // 100 - 5


class Details(_Box[None]):
    """Lines that are made anew with every moment.

    Args:
        title: of the box.
        make: makes the lines for a width.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "close", "close", show=False),
        Binding("j", "scroll(1)", show=False),
        Binding("k", "scroll(-1)", show=False),
    ]
    says_below = "esc closes"
    can_scroll = True

    def __init__(self, title: str, make: Callable[[int], Sequence[Line]]) -> None:
        super().__init__(title)
        self._make = make

    def content(self) -> Iterable[Widget]:
        """Return the lines."""
        yield Lines(classes="lines")

    def on_mount(self) -> None:
        """Take the focus, so that the arrow keys scroll."""
        self.query_one(VerticalScroll).focus()
        self.redraw()

    def on_resize(self) -> None:
        """Fit the new width."""
        self.redraw()

    def redraw(self) -> None:
        """Make the lines anew."""
        self.query_one(Lines).show(self._make(max(width_of_box(self.app.size.width), 20)))

    def action_scroll(self, by: int) -> None:
        """Scroll by lines."""
        self.query_one(VerticalScroll).scroll_relative(y=by, animate=False)


class Ask(_Box[str], inherit_bindings=False):
    """One line to type in; None where it was closed.

    Args:
        title: what is asked.
        value: what stands there first.
        hint: what may be typed.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "close", "close")]
    is_small = True
    says_below = "enter takes it, esc closes"

    def __init__(self, title: str, value: str = "", hint: str = "") -> None:
        super().__init__(title)
        self._value, self._hint = value, hint

    def content(self) -> Iterable[Widget]:
        """Return the line, and the hint."""
        yield Input(self._value, placeholder=self._hint, select_on_focus=False)
        if self._hint:
            yield Static(as_content([[(self._hint, MUTED)]]))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take what was typed."""
        self.dismiss(event.value)


class Choose(_Box[str]):
    """One of several; None where it was closed.

    Args:
        title: what is to be chosen.
        options: (what is returned, what is shown).
    """

    says_below = "enter takes it, esc closes"

    def __init__(self, title: str, options: Sequence[tuple[str, str]]) -> None:
        super().__init__(title)
        self._options = options

    def content(self) -> Iterable[Widget]:
        """Return the list."""
        yield OptionList(
            *(Option(as_content([[(text, "")]]), id=name) for name, text in self._options)
        )

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take the option."""
        self.dismiss(event.option.id)


class Confirm(_Box[bool]):
    """Something that is done only on an explicit ``y``.

    Args:
        title: what is to be done.
        lines: what that means.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,enter", "close", "no"),
    ]
    is_small = True

    def __init__(self, title: str, lines: Sequence[Line]) -> None:
        super().__init__(title)
        self._lines = lines

    def content(self) -> Iterable[Widget]:
        """Return what it means, and the answers."""
        yield Static(as_content(self._lines))
        yield Static("\n[@click=screen.answer(True)][b]y[/b] yes[/]   "
                     "[@click=screen.close][b]n[/b] no[/]")  # fmt: skip

    def action_answer(self, yes: bool) -> None:
        """Close with the answer."""
        self.dismiss(yes)
