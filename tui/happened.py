"""The last events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .draw import (
    BAD,
    BOLD,
    MUTED,
    Line,
    Look,
    line,
    wrapped,
)
from .moment import Shown
from .tables import (
    Column,
    Row,
    Table,
    View,
    who,
    word,
)

if TYPE_CHECKING:
    from ksmtrace.analysis.live import Picture
    from ksmtrace.events import Events


EVENT_COLUMNS = (
    Column("after_s", "after", lambda value, look: f"{value:.6f}", meaning="seconds since begin"),
    Column("kind", "kind", word, right=False, meaning="kind of event"),
    Column("who", "who", word, right=False, meaning="owner of the memory, or the task"),
    Column("details", "fields", word, right=False, meaning="what the kind fills"),
)

_HEX = frozenset({"mm", "rmap_item", "chain", "address", "end_address", "ksm_page", "stable_node"})


def events(shown: Shown, view: View) -> Table:
    """List the last events that match, oldest first.

    Every word of the search must match: ``pid:N`` the pid; any other the kind's name, the pid, or
    the process's name.
    """
    import numpy as np

    picture = shown.picture
    if picture is None:
        return Table(EVENT_COLUMNS, empty=f"starting: {shown.says}")
    tail = tail_of(picture)
    chosen = _matching(picture, tail, view.search)
    places = np.flatnonzero(chosen)
    most = view.most or len(places)
    rows = [event_row(picture, tail[at], int(at)) for at in places[-most:].tolist()]
    empty = f"no event kept holds {view.search!r}" if view.search else "no events yet"
    return Table(EVENT_COLUMNS, tuple(rows), len(places), empty)


def tail_of(picture: Picture) -> Events:
    """Return the events that are kept, oldest first."""
    from ksmtrace.analysis.live import KEPT_EVENTS
    from ksmtrace.events import concatenate

    return concatenate(list(picture.tail))[-KEPT_EVENTS:]


def _matching(picture: Picture, tail: Events, search: str) -> Any:
    import numpy as np

    from ksmtrace.events import KINDS

    chosen = np.ones(len(tail), bool)
    for one in search.lower().split():
        if one.startswith("pid:") and one[4:].isdecimal():
            chosen &= tail["pid"] == int(one[4:])
            continue
        kinds = [kind.number for kind in KINDS if one in kind.name]
        pids = [pid for pid in picture.names if one in who(picture, pid).lower()]
        matches = np.isin(tail["kind"], kinds) | np.isin(tail["pid"], pids)
        if one.isdecimal():
            matches |= tail["pid"] == int(one)
        chosen &= matches
    return chosen


def event_row(picture: Picture, event: Any, at: int) -> Row:
    """Write an event as a row."""
    from ksmtrace.events import KIND_BY_NUMBER

    kind = KIND_BY_NUMBER[int(event["kind"])]
    after_s = (int(event["ts_ns"]) - picture.header.started_ns) / 1e9
    parts = []
    for name in kind.body:
        if name in ("pid", "address") and name == "pid":
            continue
        if name == "err":
            continue
        value = event[name]
        if name == "comm":
            text = bytes(value).decode(errors="replace")
        elif name in _HEX:
            text = f"{int(value):#x}"
        else:
            text = f"{int(value)}"
        parts.append(f"{name}={text}")
    err = int(event["err"])
    if "err" in kind.body:
        import errno

        parts.insert(0, "ok" if err == 0 else errno.errorcode.get(-err, str(err)))
    return Row(
        f"{event['ts_ns']}.{at}",
        {
            "after_s": after_s,
            "kind": kind.name,
            "who": who(picture, int(event["pid"])),
            "details": " ".join(parts),
        },
        BAD if err else "",
    )


def event_detail(shown: Shown, row: Row, look: Look) -> list[Line]:
    """Say what an event means."""
    from ksmtrace.events import KIND_BY_NAME

    kind = KIND_BY_NAME[str(row.values["kind"])]
    lines: list[Line] = [
        line(kind.name, BOLD),
        *wrapped(kind.meaning, look.width, MUTED),
        [],
        [("after ", MUTED), (f"{row.values['after_s']:.9f} s", ""), ("  who ", MUTED),
         (str(row.values["who"]), "")],
        [],
    ]  # fmt: skip
    return lines + [line(f"  {part}") for part in str(row.values["details"]).split()]


def event_lines(row: Row, look: Look) -> list[Line]:
    """Write a row of an event among what else is said."""
    values = row.values
    text = f"{values['kind']} {values['details']}"
    return wrapped(text, look.width, "", f"{values['after_s']:>11.3f} ", " " * 14)
