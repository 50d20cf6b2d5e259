"""Which screens are tables, and what the others say as figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .draw import (
    page_bytes,
)
from .happened import events
from .judged import CLAIM_VIEWS, claims
from .moment import Shown
from .nodes import TREE_VIEWS, trees
from .processes import GROUPINGS, processes
from .tables import (
    Column,
    Row,
    Table,
    Value,
    View,
    exactly,
    word,
)

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Spec:
    """A screen's table."""

    make: Callable[[Shown, View], Table]
    ways: tuple[str, ...] = ()
    columns: Mapping[str, tuple[Column, ...]] = field(default_factory=dict)


SPECS = {
    "processes": Spec(processes, GROUPINGS),
    "trees": Spec(trees, TREE_VIEWS),
    "claims": Spec(claims, CLAIM_VIEWS),
    "events": Spec(events),
}


def figures(shown: Shown) -> Table:
    """Return what the screens without a table say, as names and values."""
    columns = (
        Column("name", "name", word, right=False),
        Column("value", "value", exactly),
    )
    picture = shown.picture
    values: dict[str, Value] = {}
    sample = picture.sample if picture else shown.early
    if sample is not None:
        values |= sample.ksm
        values |= sample.vmstat
        values |= {f"ksmd.{name}": value for name, value in sample.ksmd.items()}
    if picture is not None:
        values["page_bytes"] = page_bytes(picture)
        values["events"] = picture.nr_events
        values["lost"] = picture.nr_lost
        values |= {f"events.{name}": n for name, n in picture.by_kind.items()}
        if picture.merges is not None:
            values["merges.attempts"] = picture.merges.attempts
            values["merges.succeeded"] = picture.merges.succeeded
            values |= {f"merges.failed.{why}": n for why, n in picture.merges.failed.items()}
    rows = [Row(name, {"name": name, "value": value}) for name, value in values.items()]
    return Table(columns, tuple(rows), len(rows))
