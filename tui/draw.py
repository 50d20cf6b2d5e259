"""What screens are made of: lines of text, made from one moment, for one width.

A line is a list of (text, style); the styles are textual's, so that they follow the theme.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from textual.content import Content

from ksmtrace.units import text_bytes, text_count, text_duration

from .moment import Phase, Shown

if TYPE_CHECKING:
    from ksmtrace.analysis.live import Picture
    from ksmtrace.stream import CounterSample

Line = list[tuple[str, str]]
Writer = Callable[[float | None, "Look"], str]

MUTED, BOLD, BAD, WARN, GOOD = ("$said-muted", "bold", "$said-bad", "$said-warn", "$said-good")
BAR = "$said-bar"
ABSENT = "absent"


@dataclass(frozen=True)
class Look:
    """How things are written.

    Attributes:
        width: of the screen, in cells.
        exact: numbers in full instead of readable ones.
        changed: knobs that were changed from here, and what they were.
    """

    width: int
    exact: bool = False
    changed: Mapping[str, str] | None = None


def as_content(lines: Iterable[Line]) -> Content:
    """Join lines to what a widget shows."""
    parts: list[tuple[str, str]] = []
    for line in lines:
        parts += [*line, ("\n", "")]
    return Content.assemble(*parts[:-1])


def line(text: str, style: str = "") -> Line:
    """Return a line of one style."""
    return [(text, style)]


def wrapped(text: str, width: int, style: str = "", first: str = "", then: str = "") -> list[Line]:
    """Break a text into lines."""
    found = textwrap.wrap(
        text,
        max(width, 20),
        initial_indent=first,
        subsequent_indent=then or " " * len(first),
        break_on_hyphens=False,
    )
    return [line(one, style) for one in found]


def width_of(of: Line) -> int:
    """Count the cells of a line."""
    return sum(cell_len(text) for text, _ in of)


def cut(of: Line, width: int) -> Line:
    """Shorten or lengthen a line to a width."""
    found: Line = []
    left = width
    for text, style in of:
        taken = min(cell_len(text), left)
        found.append((set_cell_size(text, taken), style))
        left -= taken
    return [*found, (" " * left, "")] if left else found


def beside(left: Sequence[Line], right: Sequence[Line], width: int) -> list[Line]:
    """Put two blocks side by side; one above the other where that would cut one off."""
    half = (width - 2) // 2
    room = width - 2 - max(map(width_of, right), default=0)
    widest = max(map(width_of, left), default=0)
    if widest > room:
        return [*left, [], *right]
    half = min(max(half, widest), room)
    rows = max(len(left), len(right))
    blank: Line = []
    return [
        [
            *cut(left[row] if row < len(left) else blank, half),
            ("  ", ""),
            *(right[row] if row < len(right) else blank),
        ]
        for row in range(rows)
    ]


def cell(text: str, width: int) -> str:
    """Write a cell of a table flush right; exact numbers never touch the cell before."""
    return f" {text:>{width - 1}}"


# ---- numbers ----


def count(value: float | None, look: Look) -> str:
    """Write a count; None is absent."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if look.exact else text_count(value)


def size(value: float | None, look: Look) -> str:
    """Write a size in bytes; None is absent."""
    if value is None:
        return ABSENT
    return f"{value:,.0f} B" if look.exact else text_bytes(value)


def duration(value: float | None, look: Look) -> str:
    """Write a duration; None is a dash."""
    if value is None:
        return "–"
    return f"{value:,.0f} ns" if look.exact else text_duration(value)


def rate(value: float | None, look: Look) -> str:
    """Write a rate per second; None is absent."""
    if value is None:
        return ABSENT
    return f"{value:,.1f}/s" if look.exact else f"{text_count(round(value, 1))}/s"


def number(of: CounterSample | None, name: str) -> int | None:
    """Return a counter of a sample, None where it is absent."""
    value = None if of is None else of.ksm.get(name)
    return value if isinstance(value, int) else None


def named(name: str, value: str, note: str = "", style: str = "") -> Line:
    """Write a value behind its name."""
    return [(f"  {name:<17}", MUTED), (value, style or BOLD), (f" {note}" if note else "", MUTED)]


def page_bytes(picture: Picture | None) -> int:
    """Return the size of a page of that kernel."""
    return int((picture.header.facts.get("page_size_bytes") if picture else None) or 4096)


def clock(shown: Shown) -> str:
    """Write the time of day that is shown."""
    picture = shown.picture
    if picture is None:
        return ""
    header = picture.header
    at_ns = header.started_realtime_ns + picture.at_ns - header.started_ns
    return time.strftime("%H:%M:%S", time.localtime(at_ns / 1e9))


# ---- the line at the top ----


def status(shown: Shown, look: Look) -> Line:
    """Say what is shown, and how it stands."""
    picture = shown.picture
    styles = {Phase.FAILED: f"bold {BAD}", Phase.LIVE: f"bold {GOOD}"}
    said: Line = [(shown.phase.value.upper(), styles.get(shown.phase, BOLD))]
    if shown.position is not None:
        position = shown.position
        share = position.at_ns / position.length_ns if position.length_ns else 1.0
        said.append(
            (
                f" {position.at_ns / 1e9:.1f} of {position.length_ns / 1e9:.1f} s ({share:.0%}) "
                f"×{position.speed:g}",
                "",
            )
        )
    if picture is not None:
        release = (picture.header.facts.get("kernel") or {}).get("release") or "?"
        said += [("  ", ""), (clock(shown), BOLD)]
        said.append((f"  {count(picture.nr_events, look)} events", ""))
        if picture.nr_lost:
            said.append((f"  {picture.nr_lost:,} LOST", f"bold {BAD}"))
        if picture.skipped:
            said.append((f"  {picture.skipped:,} not drawn", WARN))
        if shown.recorder is not None and not shown.recorder.says:
            said.append((f"  ● REC {text_bytes(shown.recorder.written_bytes)}", f"bold {BAD}"))
        elif shown.recorder is not None and shown.recorder.says != "recorded":
            said.append(("  NOT RECORDED", f"bold {BAD}"))
        room = look.width - width_of(said) - len("  Linux ")
        if room >= 12:
            said.append((f"  Linux {release[:room]}", MUTED))
    return cut(said, look.width)


# ---- what cannot be seen ----


def absence(picture: Picture, event: str) -> str:
    """Say in the plan's words why a kind of event is absent."""
    entry = next((one for one in picture.header.plan if one["event"] == event), None)
    return str(entry["reason"]) if entry else "the recording is older than this"


def gap(picture: Picture, event: str, look: Look) -> list[Line]:
    """Say below a heading why a kind of event is absent."""
    return wrapped(absence(picture, event), look.width, MUTED, "  ")


def gaps(picture: Picture, words: Sequence[str], look: Look) -> list[Line]:
    """Say what this kernel does not show, and what would change that.

    Args:
        picture: the stream.
        words: parts of what is meant; empty for all.
        look: how things are written.
    """
    lines: list[Line] = []
    for what, why, change in picture.header.unseen:
        if not words or any(word in what for word in words):
            lines += wrapped(f"{what}: {why}", look.width, MUTED, "  – ", "    ")
            lines += wrapped(f"would change it: {change}", look.width, MUTED, "    ", "    ")
    if lines:
        lines.insert(0, line("NOT VISIBLE HERE", f"bold {MUTED}"))
    return lines


def bar_rows(slots: Sequence[tuple[int, int, int]], write: Writer, look: Look) -> list[Line]:
    """Draw a histogram, a row per slot: from, below, count."""
    lines: list[Line] = []
    most = max(n for *_, n in slots)
    for low, below, n in slots:
        bar = "█" * round(n * 24 / most) or ("▏" if n else "")
        span = f"{write(low, look)} to {write(below, look)}"
        lines.append([(f"    {span:>22} ", MUTED), (f"{bar:<24}", BAR), (f" {n:,}", "")])
    return lines
