"""What a plot shows, as plain data: a section says it, and ``ksmtrace/cli/plots.py`` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ksmtrace.units import text_count, text_duration


@dataclass(frozen=True)
class Series:
    """Values that belong together.

    Attributes:
        name: what they are.
        values: one per place on the other axis; None is unknown, and leaves a gap.
        dashed: drawn as a dashed line, to tell it from what it lies upon.
    """

    name: str
    values: Sequence[float | None]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One of several plots above each other, with an axis of its own.

    Attributes:
        title: what it shows, with the unit.
        series: all with as many values as the timeline has times.
    """

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Timeline:
    """Values over time.

    Attributes:
        title: its heading.
        times_s: seconds since the recording began, rising.
        panels: from above.
        span_s: a value is of so long from its time on, and drawn as a bar; None: a value was read
            at its time, and holds until the next one.
    """

    title: str
    times_s: Sequence[float]
    panels: tuple[Panel, ...]
    span_s: float | None = None

    def describe(self) -> str:
        """Say in words what is drawn."""
        said = []
        for panel in self.panels:
            for series in panel.series:
                known = [
                    (value, at)
                    for value, at in zip(series.values, self.times_s, strict=True)
                    if value is not None
                ]
                if known:
                    most, at = max(known, key=lambda one: one[0])
                    last = text_count(known[-1][0])
                    said.append(
                        f"{panel.title}, {series.name}: at most {text_count(most)}, after "
                        f"{at:.3g} s, at last {last}"
                    )
        return "; ".join(said)


@dataclass(frozen=True)
class Bars:
    """Counts by name, from the top; several series are drawn behind each other in one bar.

    Attributes:
        title: its heading.
        unit: what is counted.
        names: one per bar.
        series: all with as many values as there are names.
        numbered: the names are numbers that rise: drawn from the left, not from the top.
    """

    title: str
    unit: str
    names: Sequence[str]
    series: tuple[Series, ...]
    numbered: bool = False

    def describe(self) -> str:
        """Say in words what is drawn."""
        bars = []
        for at, name in enumerate(self.names):
            values = [
                f"{series.name} " * (len(self.series) > 1) + text_count(value)
                for series in self.series
                if (value := series.values[at]) is not None
            ]
            bars.append(f"{name}: {', '.join(values) or 'unknown'}")
        return f"{self.unit} by bar: {'; '.join(bars)}"


@dataclass(frozen=True)
class Histogram:
    """Counts by slots that grow by powers of two.

    Attributes:
        title: its heading.
        unit: what was measured; ``ns`` is written as durations.
        slots: (from, below, count), adjacent and rising.
    """

    title: str
    unit: str
    slots: Sequence[tuple[int, int, int]]

    def text(self, value: float) -> str:
        """Write a bound of a slot."""
        return text_duration(value) if self.unit == "ns" else text_count(value)

    def describe(self) -> str:
        """Say in words what is drawn."""
        slots = [
            f"{count:,} from {self.text(first)} to below {self.text(below)}"
            for first, below, count in self.slots
            if count
        ]
        return "; ".join(slots)


@dataclass(frozen=True)
class Matrix:
    """Counts from each of some names to each.

    Attributes:
        title: its heading.
        unit: what is counted.
        names: of the rows from above, and of the columns from the left.
        rows: a count per column; None is left blank.
    """

    title: str
    unit: str
    names: Sequence[str]
    rows: Sequence[Sequence[int | None]]

    def describe(self) -> str:
        """Say in words what is drawn."""
        cells = [
            f"{one} with {other}: {count:,}"
            for one, row in zip(self.names, self.rows, strict=True)
            for other, count in zip(self.names, row, strict=True)
            if count
        ]
        return f"{self.unit}: {'; '.join(cells)}"


@dataclass(frozen=True)
class Absent:
    """A plot that is not drawn, and why."""

    title: str
    why: str


Chart = Timeline | Bars | Histogram | Matrix | Absent
