"""What this kernel's hooks cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.table import wrap


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    yield "NOT VISIBLE ON THIS KERNEL"
    for gap in content["not_visible"]:
        yield from wrap(f"{gap['what']}: {gap['why']}", "  - ", "      ")
