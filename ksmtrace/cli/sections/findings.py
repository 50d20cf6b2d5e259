"""What asks for action."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    yield "WHAT ASKS FOR ACTION"
    for finding in content["findings"] or ["nothing found"]:
        yield f"  - {finding}"
