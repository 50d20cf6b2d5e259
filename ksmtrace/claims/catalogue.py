"""The numbers of the catalogue of what has been said of KSM: a claim answers for each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

SPANS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "C": ((1, 74), (80, 112), (120, 127)),
        "D": ((1, 9),),
        "R": ((1, 25),),
        "DOC": ((1, 24),),
        "Q": ((1, 11),),
        "I": ((1, 14),),
    }
)
"""Per list its numbers, from the first to the last of each span: C of five threads of linux-mm and
what the patches of their time said, D derived from the code, R races, DOC the admin guide against
the code, Q at rest, I while ksmd scans. What lies between the spans was never given out."""


def catalogue_ids() -> frozenset[str]:
    """Return every number, as claims have it: ``C07``, ``DOC7``."""
    return frozenset(
        f"{prefix}{number:02d}" if prefix == "C" else f"{prefix}{number}"
        for prefix, spans in SPANS.items()
        for first, last in spans
        for number in range(first, last + 1)
    )
