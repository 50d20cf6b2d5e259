"""The table of claims: the lists of all topics."""

from __future__ import annotations

from collections.abc import Sequence

from ksmtrace.claims import (
    accounts,
    invariants,
    knobs,
    memory,
    migration,
    statistics,
    swap,
    trees,
    unmerge,
)
from ksmtrace.claims.claim import Claim
from ksmtrace.errors import UsageError

CLAIMS: tuple[Claim, ...] = (
    *statistics.CLAIMS,
    *knobs.CLAIMS,
    *trees.CLAIMS,
    *unmerge.CLAIMS,
    *migration.CLAIMS,
    *swap.CLAIMS,
    *invariants.CLAIMS,
    *accounts.CLAIMS,
    *memory.CLAIMS,
)
"""Every claim."""


def choose(ids: Sequence[str]) -> tuple[Claim, ...]:
    """Select the claims with these ids; all where none is given.

    An id without a suffix also selects what the code defines: ``C07`` has ``C07.code`` with it.

    Raises:
        UsageError: no claim has such an id.
    """
    if not ids:
        return CLAIMS
    chosen = []
    for wanted in ids:
        found = [
            claim
            for claim in CLAIMS
            if any(
                wanted.lower() in (known.lower(), known.split(".")[0].lower())
                for known in claim.ids
            )
        ]
        if not found:
            raise UsageError(
                f"there is no claim {wanted!r}", "ksmtrace check --list names them all"
            )
        chosen += found
    return tuple(claim for claim in CLAIMS if claim in chosen)
