"""The locks: who waits, for whom, how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ksmtrace.words import HELD_BY

from .draw import (
    BOLD,
    MUTED,
    WARN,
    Line,
    Look,
    bar_rows,
    beside,
    cell,
    count,
    duration,
    gaps,
    line,
    named,
    wrapped,
)
from .moment import Shown

if TYPE_CHECKING:
    from ksmtrace.analysis.contention import Contention, Party, Wait
    from ksmtrace.analysis.live import Picture

_MOST_PARTIES = 5
_MOST_WORST = 3
_NO_BREAK = "\N{NO-BREAK SPACE}"
_MOST_FRAMES = 6
_WIDE = 120  # from so many cells on, waits and holds are side by side


def locks(shown: Shown, look: Look) -> list[Line]:
    """Say who waited for a CPU and for locks, and what the programs' functions do."""
    picture = shown.picture
    if picture is None:
        return wrapped(f"starting: {shown.says}", look.width, BOLD)
    lines = [*_of_cpu(picture, look), [], *_of_locks(picture, look), []]
    lines += [*_functions(picture, look), []]
    return lines + gaps(picture, ("waits for", "dropping an mm"), look)


def _of_cpu(picture: Picture, look: Look) -> list[Line]:
    lines: list[Line] = [line("KSMD WAITS", BOLD)]
    first, last = picture.first_sample, picture.sample
    delay = None
    if first is not None and last is not None:
        then, now = first.ksmd.get("run_delay_ns"), last.ksmd.get("run_delay_ns")
        delay = None if then is None or now is None else now - then
        elapsed_ns = max(last.begin_ns - first.begin_ns, 1)
    if delay is None:
        lines.append(line("  for a CPU: unknown", MUTED))
    else:
        lines.append(
            named("for a CPU", duration(delay, look), f"{delay / elapsed_ns:.2%} of the time")
        )
    return lines


def _functions(picture: Picture, look: Look) -> list[Line]:
    calls = picture.losses.calls if picture.losses else {}
    lines: list[Line] = [line("FUNCTIONS WITH PROGRAMS", BOLD)]
    if not calls:
        lines.append(line("  none on this kernel", MUTED))
    else:
        lines.append(line(f"  {'':<34}{'entered':>14}{'returned':>14}", MUTED))
    for name, (entered, returned) in calls.items():
        lines.append(
            [
                (f"  {name[:33]:<34}", ""),
                (cell("–" if entered is None else count(entered, look), 14), BOLD),
                (cell("–" if returned is None else count(returned, look), 14), BOLD),
            ]
        )
    return lines


def _of_locks(picture: Picture, look: Look) -> list[Line]:
    seen = {
        name: lock
        for name, lock in picture.waits.items()
        if lock.waits is not None or lock.holds is not None
    }
    if not seen:
        why = {lock.why_not.get("waits", "") for lock in picture.waits.values()}
        return [
            [("WAITS FOR LOCKS", BOLD), ("  not visible", MUTED)],
            *(one for text in sorted(why) for one in wrapped(text, look.width, MUTED, "  ")),
        ]
    waits = _times("WAITS FOR LOCKS", seen, "waits", look)
    holds = _times("HELD BY KSMD", seen, "holds", look)
    lines = beside(waits, holds, look.width) if look.width >= _WIDE else [*waits, [], *holds]
    for name, lock in seen.items():
        for label, parties in (("waited", lock.waiters), ("waited for", lock.holders)):
            if parties:
                lines += _parties(f"{name}: {label}", parties, look)
    worst = [(wait, name) for name, lock in seen.items() for wait in lock.worst]
    worst.sort(key=lambda one: -one[0].duration_ns)
    if worst:
        lines += [[], line("LONGEST WAITS", BOLD)]
        for wait, name in worst[:_MOST_WORST]:
            lines += _wait(wait, name, picture.header.started_ns, look)
    blocks = [
        [line(f"  {name}: {what}, how long", MUTED), *bar_rows(histogram.slots, duration, look)]
        for name, lock in seen.items()
        for what, histogram in (("waits", lock.wait_histogram), ("holds", lock.hold_histogram))
        if histogram is not None
    ]
    if blocks:
        lines += [[], line("HISTOGRAMS", BOLD)]
    while blocks:
        left = blocks.pop(0)
        if look.width >= _WIDE and blocks:
            lines += beside(left, blocks.pop(0), look.width)
        else:
            lines += left
    return [*lines, *_not_seen(picture, look)]


def _times(title: str, locks: dict[str, Contention], side: str, look: Look) -> list[Line]:
    rows: list[tuple[str, ...]] = [(side, "together", "median", "longest")]
    for lock in locks.values():
        if side == "waits":
            times, total, worst = lock.waits, lock.total_wait_ns, lock.worst_wait_ns
            histogram = lock.wait_histogram
        else:
            times, total, worst = lock.holds, lock.total_hold_ns, lock.worst_hold_ns
            histogram = lock.hold_histogram
        median = f"< {duration(histogram.median[1], look)}" if histogram else "–"
        rows.append(
            ()
            if times is None
            else (
                count(times, look),
                duration(total, look),
                median,
                duration(worst or None, look),
            )
        )
    widths = [
        max(least, *(len(row[at]) + 2 for row in rows if row))
        for at, least in enumerate((9, 11, 13, 11))
    ]
    lines: list[Line] = [line(title, BOLD)]
    for name, row in zip(("", *locks), rows, strict=True):
        if not row:
            lines.append([(f"  {name:<17}", MUTED), ("not visible", MUTED)])
            continue
        cells = [f"{text:>{width}}" for text, width in zip(row, widths, strict=True)]
        style = (MUTED,) * 4 if not name else (BOLD, "", "", "" if row[3] == "–" else WARN)
        lines.append([(f"  {name:<17}", ""), *zip(cells, style, strict=True)])
    return lines


def _parties(label: str, parties: Sequence[Party], look: Look) -> list[Line]:
    said = [
        f"{party.comm or 'unknown'} ({party.pid}) {party.waits:,}×, "
        f"{duration(party.total_ns, look)}"
        for party in parties[:_MOST_PARTIES]
    ]
    more = f" and {len(parties) - _MOST_PARTIES} more" if len(parties) > _MOST_PARTIES else ""
    # A figure and its unit, and who it is of, stay on one line.
    together = ", ".join(one.replace(" ", _NO_BREAK) for one in said)
    lines = wrapped(f"{label}: {together}{more}", look.width, "", "  ", "    ")
    return [[(text.replace(_NO_BREAK, " "), style) for text, style in one] for one in lines]


def _wait(wait: Wait, lock: str, started_ns: int, look: Look) -> list[Line]:
    holder = ""
    if wait.holder_pid and wait.holder_by:
        whom = f"{wait.holder or 'unknown'} ({wait.holder_pid})"
        holder = f", {HELD_BY[wait.holder_by].format(whom)}"
    how = f"{', exiting' if wait.exiting else ''}{'' if wait.exclusive else ', to read'}"
    at = f"until {(wait.ts_ns - started_ns) / 1e9:.3f} s"
    said: Line = [
        (f"  {duration(wait.duration_ns, look):>9} ", WARN),
        (lock, BOLD),
        (f" {wait.comm or 'unknown'} ({wait.pid}){how}{holder}, {at}", ""),
    ]
    if not wait.stack:
        return [said]
    names = [frame.partition("+")[0] for frame in wait.stack]
    more = " ..." if len(names) > _MOST_FRAMES else ""
    stack = " < ".join(names[:_MOST_FRAMES]) + more
    return [said, *wrapped(stack, look.width, MUTED, "            ")]


def _not_seen(picture: Picture, look: Look) -> list[Line]:
    lines: list[Line] = []
    for name, lock in picture.waits.items():
        for what, why in lock.why_not.items():
            lines += wrapped(
                f"{name}: {what} not visible: {why}", look.width, MUTED, "  – ", "    "
            )
    return [[], *lines] if lines else []
