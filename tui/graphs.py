"""Bars over the last minute, a row each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ksmtrace.units import text_bars

from .draw import BAR, BOLD, MUTED, Line, Look, line, rate

if TYPE_CHECKING:
    from ksmtrace.analysis.live import Picture, SamplePoint
    from ksmtrace.analysis.rates import Rates

_GRAPH_S = 60


@dataclass(frozen=True)
class Graph:
    """One row of a graph.

    Attributes:
        label: its name.
        rate: a name in the picture's rates, or "" for one that is sampled.
        of: what is sampled of a point.
        scale: what a unit is.
    """

    label: str
    rate: str = ""
    of: Callable[[SamplePoint], int | None] | None = None
    is_cpu: bool = False


GRAPHS = {
    "attempts": Graph("attempts", "attempts"),
    "merged": Graph("merged", "merged"),
    "failed": Graph("failed", "failed"),
    "zero_merged": Graph("zero pages", "zero_merged"),
    "left_singly": Graph("left singly", "left_singly"),
    "sharers_removed": Graph("left with node", "sharers_removed"),
    "nodes_freed": Graph("nodes freed", "nodes_freed"),
    "unmerges": Graph("break_ksm calls", "unmerges"),
    "migrated": Graph("moved", "migrated"),
    "cow_ksm": Graph("copied (cow_ksm)", of=lambda point: point.cow_ksm),
    "scanned": Graph("pages scanned", of=lambda point: point.pages_scanned),
    "cpu": Graph("ksmd CPU", of=lambda point: point.cpu_ns, is_cpu=True),
}


def graphs(picture: Picture, look: Look, names: Sequence[str]) -> list[Line]:
    """Draw what happened over the last minute, a row each."""
    edges = edges_of(picture, look)
    span_s = (edges[1] - edges[0]) / 1e9
    rows: list[tuple[str, str, str, str]] = []
    for name in names:
        if name == "left":
            # Singly where that is caught, else with their node.
            name = (
                "left_singly"
                if picture.rates.counts["left_singly"] is not None
                else ("sharers_removed")
            )
        graph = GRAPHS[name]
        values = (
            rate_values(picture.rates, graph.rate, edges)
            if graph.rate
            else _sampled(picture, graph, edges)
        )
        label = f"  {graph.label:<17}"
        if values is None:
            why = "not visible on this kernel" if graph.rate else "absent on this kernel"
            if graph.of is not None and not picture.points:
                why = "not sampled yet"
            rows.append((label, "", why, MUTED))
            continue
        most = max(values) / span_s
        # Since the last sample nothing is known, which is no 0.
        last = values[-1] / span_s if graph.of is None else last_rate(picture.points, graph.of)
        most = max(most, last or 0.0)
        if last is None:
            said = f"at most {most / 1e9:.1%}" if graph.is_cpu else f"at most {rate(most, look)}"
        elif graph.is_cpu:
            said = f"{last / 1e9:.1%}, at most {most / 1e9:.1%}"
        else:
            said = f"{rate(last, look)}, at most {rate(most, look)}"
        rows.append((label, text_bars(values), f" {said}", ""))
    # Long figures take the place of the oldest bars, of all rows alike.
    long = [len(label + bars + said) for label, bars, said, _ in rows if bars]
    over = max(max(long, default=0) - look.width, 0)
    lines: list[Line] = [
        [(label, MUTED), (bars[over:], BAR), (said, style)] for label, bars, said, style in rows
    ]
    heading = f"OVER TIME  ({span_s:g} s a bar)"
    return [line(heading, BOLD), *lines]


def edges_of(picture: Picture, look: Look) -> list[int]:
    """Return between which times the bars are, CLOCK_MONOTONIC; one more than bars."""
    width = max(min(look.width - 44, 120), 10)
    started_ns = picture.header.started_ns
    whole_s = max((picture.at_ns - started_ns) / 1e9, 0.25)
    shown_s = min(whole_s, _GRAPH_S)
    span_ns = picture.rates.span_ns
    for step in (1, 2, 4, 8, 20, 40):
        if step * span_ns * width >= shown_s * 1e9:
            break
    span_ns *= step
    end = (picture.at_ns - started_ns) // span_ns + 1
    begin = max(end - width, 0)
    return [started_ns + span_ns * bucket for bucket in range(begin, end + 1)]


def rate_values(rates: Rates, name: str, edges: Sequence[int]) -> list[float] | None:
    """Return what was counted between the times; None where it was not caught."""
    counts = rates.counts[name]
    if counts is None:
        return None
    values = []
    for begin_ns, end_ns in itertools.pairwise(edges):
        first = max((begin_ns - rates.begin_ns) // rates.span_ns, 0)
        last = max((end_ns - rates.begin_ns) // rates.span_ns, 0)
        values.append(float(counts[first:last].sum()))
    return values


def _sampled(picture: Picture, graph: Graph, edges: Sequence[int]) -> list[float] | None:
    import numpy as np

    assert graph.of is not None
    known = [
        (point.begin_ns, value)
        for point in picture.points
        if (value := graph.of(point)) is not None
    ]
    if not known:
        return None
    times, values = zip(*known, strict=True)
    at = np.interp(np.array(edges, np.float64), times, values)
    return [max(float(step), 0.0) for step in np.diff(at)]


def last_rate(
    points: Sequence[SamplePoint], of: Callable[[SamplePoint], int | None]
) -> float | None:
    """Return the rate per second between the last two samples, None where it is not known."""
    if len(points) < 2:
        return None
    before, last = points[-2], points[-1]
    then, now = of(before), of(last)
    if then is None or now is None or last.begin_ns <= before.begin_ns:
        return None
    return (now - then) * 1e9 / (last.begin_ns - before.begin_ns)
