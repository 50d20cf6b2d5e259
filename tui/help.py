"""The help: keys, what a screen shows, and its columns."""

from __future__ import annotations

from collections.abc import Sequence

from .draw import BOLD, MUTED, Line, line, wrapped
from .tables import Column

_KEYS = (
    ("1 to 7, tab", "the screens", None),
    ("↑ ↓ PgUp PgDn", "move; ← → scroll a wide table", None),
    ("enter", "open the row that the cursor is on", None),
    ("/", "search; esc shows all again", None),
    ("s, S", "sort by the next column; the other way round (or click on a heading)", None),
    ("g", "group: processes by cgroup or guest; nodes or chains; claims or books", None),
    ("x", "exact numbers, or readable ones", None),
    ("space", "hold the picture, or go on; events are taken in meanwhile", True),
    ("r", "record from the moment before, at most a minute; again: end it", True),
    ("w", "read the page truth: what mergeable memory maps, beside the counters", True),
    ("k", "change a knob of KSM, after a confirmation; it stays changed", True),
    ("space", "pause, or play on", False),
    (". + -", "step; faster; slower", False),
    ("[ ] { }", "back and on by a twentieth; to the begin; to the end", False),
    ("e, E", "export the table as CSV, or JSON", None),
    ("p", "save a picture of the screen (SVG)", None),
    ("J", "judge the claims again", None),
    ("t", "light, or dark", None),
    ("ctrl+p", "the command palette", None),
    ("q, ctrl+c", "quit", None),
)

_ABOUT = {
    "overview": "Whether KSM pays: what it saves by the kernel's counters, by page truth (the page "
    "tables, read from outside KSM), and what is left after its own memory (general_profit); what "
    "happens now; the trees by the counters and as reconstructed from events; the knobs in force.",
    "processes": "Every process that KSM deals with. What is counted by the kernel is as of the "
    "last sample; what happened since the start is counted by events.",
    "trees": "The stable nodes with the most sharers, as reconstructed from the events.",
    "outcomes": "What became of the attempts to merge, and how ksmd looks at pages.",
    "locks": "What is known of waiting.",
    "claims": "What has been said about KSM, judged on what is observed. Live, that is at most the "
    "last minute. g shows the counters' books instead.",
    "events": "The last 20,000 events, without those that happen for every page.",
}


def explained(name: str, room: int, meaning: str, width: int) -> list[Line]:
    """Write a name, and what it means beside it."""
    first, *more = wrapped(meaning, width - room - 2)
    return [
        [(f"  {name:<{room}}", BOLD), *first],
        *([(" " * (room + 2), ""), *one] for one in more),
    ]


def help_lines(tab: str, is_live: bool, columns: Sequence[Column], width: int) -> list[Line]:
    """Write the help of a screen."""
    lines = [line(tab.upper(), BOLD), *wrapped(_ABOUT[tab], width)]
    if columns:
        lines += [[], line("COLUMNS", BOLD)]
        for column in columns:
            lines += explained(column.title, 12, column.meaning, width)
    lines += [[], line("KEYS", BOLD)]
    for keys, meaning, live in _KEYS:
        if live is None or live == is_live:
            lines += explained(keys, 15, meaning, width)
    lines += [
        [],
        *wrapped(
            "“absent” and “not visible” mean that this kernel does not tell, and never 0; "
            "ksmtrace doctor says why.",
            width,
            MUTED,
        ),
    ]
    return lines
