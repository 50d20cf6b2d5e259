"""Known races: which of them were seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.table import wrap


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    races = content["races"]
    seen, not_seen, blind = (
        [race for race in races if race["verdict"] == verdict]
        for verdict in ("seen", "not seen", "cannot be seen")
    )
    yield (
        f"RACES AND LOCK TROUBLES: {len(seen)} seen, {len(not_seen)} looked for and not seen, "
        f"{len(blind)} cannot be seen here"
    )
    for race in seen:
        yield f"  {race['id']} {race['times']:,}x  {race['what']}{_fault(race)}"
        for sentence in race["evidence"]:
            yield from wrap(sentence, "      ", "        ")
    if not everything:
        if not_seen:
            yield from wrap(
                f"not seen: {', '.join(race['id'] for race in not_seen)} (--all says what was "
                "looked at, and why others cannot be seen)",
                "  ",
                "    ",
            )
        return
    for race in not_seen:
        yield f"  {race['id']} not seen  {race['what']}"
        for sentence in race["evidence"]:
            yield from wrap(sentence, "      ", "        ")
        if race["unprovoked"]:
            yield from wrap(
                f"no kernel was made to show it: {race['unprovoked']}", "      ", "        "
            )
    for race in blind:
        yield from wrap(
            f"{race['id']} cannot be seen  {race['what']}: {race['why_not']}", "  ", "      "
        )


def _fault(race: dict[str, Any]) -> str:
    return ": A FAULT, of the kernel or of ksmtrace" if race["fault"] else ""
