"""How many events of each kind, and how they were caught."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.table import wrap


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    yield "EVENTS, BY HOW THEY WERE CAUGHT"
    by_rung: dict[str, list[str]] = {}
    for name, rung in content["rungs"].items():
        count = content["events"][name]
        text = f"{name} {count:,}" if count is not None else f"{name} only counted"
        by_rung.setdefault(rung, []).append(name if rung == "absent" else text)
    for rung in sorted(by_rung, key=lambda rung: rung == "absent"):
        yield from wrap(f"{rung}: {', '.join(by_rung[rung])}", "  ", "      ")
