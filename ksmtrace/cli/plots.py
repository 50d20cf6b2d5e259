"""Draws charts as SVG that goes into a page: the only module with matplotlib in it.

SVG and not a plotting library for browsers: such a page is 0.9 to 4.8 MB of JavaScript (vega,
bokeh, plotly) before it shows anything, and this one has no script at all. Text stays text, and
colours are the page's, so that light and dark need one drawing.
"""

from __future__ import annotations

import html
import io
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ksmtrace.cli.charts import Absent, Bars, Chart, Histogram, Matrix, Timeline
from ksmtrace.units import text_count

# Drawn in these, and then named after the page's own colours.
_TEXT, _GRID = "#a20001", "#a20002"
_SERIES = [f"#a1000{number}" for number in range(1, 7)]
_INCH_WIDTH = 9.2
_MOST_LABELS = 24
_ABOVE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 0.98),
    "ncols": 4,
    "borderpad": 0,
}
_STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    "svg.hashsalt": "ksmtrace",
    # A process may be called $x$.
    "text.parse_math": False,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of the cache of its fonts


def draw(chart: Chart, name: str) -> str:
    """Draw one chart.

    Args:
        chart: anything but an absent one.
        name: begins every id in the drawing, so that there may be several in one page.

    Returns:
        An ``<svg>`` element with a title and a description.
    """
    assert not isinstance(chart, Absent)
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        if isinstance(chart, Timeline):
            figure = _timeline(chart)
        elif isinstance(chart, Histogram):
            figure = _histogram(chart)
        elif isinstance(chart, Matrix):
            figure = _matrix(chart)
        else:
            figure = _columns(chart) if chart.numbered else _bars(chart)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return _as_element(written.getvalue(), name, chart.title, chart.describe())


def _as_element(svg: str, name: str, title: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"#a1000(\d)", r"var(--series-\1)", body)
    body = body.replace(_TEXT, "var(--text)").replace(_GRID, "var(--line)")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    return (
        f'<svg role="img" aria-labelledby="{name}-title {name}-what" {box[0]} '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-what">{html.escape(description)}</desc>{body}'
    )


def _figure(height: float, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(_INCH_WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def _count_axis(axis: Any, values: Iterable[float | None]) -> None:
    """Mark whole numbers only where there is nothing between them."""
    whole = all(value is None or value == int(value) for value in values)
    axis.set_major_locator(MaxNLocator(4, integer=whole, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    return f"{value:,.10g}" if abs(value) < 1_000_000 else text_count(value)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _timeline(chart: Timeline) -> Figure:
    figure, all_axes = _figure(0.55 + 1.15 * len(chart.panels), len(chart.panels))
    times = list(chart.times_s)
    for row, (axes, panel) in enumerate(zip(all_axes, chart.panels, strict=True)):
        for number, series in enumerate(panel.series):
            colour = _SERIES[(number if len(panel.series) > 1 else row) % len(_SERIES)]
            values = _numbers(series.values)
            if chart.span_s is not None:
                axes.bar(times, values, width=chart.span_s, align="edge", color=colour, linewidth=0)
            else:
                axes.plot(
                    times,
                    values,
                    drawstyle="steps-post",
                    color=colour,
                    linestyle="--" if series.dashed else "-",
                    marker="o" if len(times) <= 40 else None,
                    markersize=2.5,
                    linewidth=1.4,
                    label=series.name,
                )
        axes.set_title(panel.title)
        axes.grid(axis="y")
        known = [v for s in panel.series for v in s.values if v is not None]
        low, high = min(known, default=0), max(known, default=0)
        room = (high - min(low, 0)) * 0.08 or 1
        axes.set_ylim(low - room if low < 0 else 0, high + room)
        _count_axis(axes.yaxis, known)
        if len(panel.series) > 1:
            axes.legend(**_ABOVE)
    length_s = times[-1] - times[0] + (chart.span_s or 0)
    all_axes[-1].set_xlim(times[0] - length_s * 0.005, times[0] + length_s * 1.01)
    all_axes[-1].set_xlabel("seconds since the recording began")
    return figure


def _bars(chart: Bars) -> Figure:
    figure, (axes,) = _figure(0.62 + 0.27 * len(chart.names) + 0.16 * (len(chart.series) > 1))
    places = range(len(chart.names))
    ends = [0.0] * len(chart.names)
    for number, series in enumerate(chart.series):
        values = [value or 0 for value in series.values]
        axes.barh(places, values, left=ends, height=0.62, color=_SERIES[number], label=series.name)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    most = max(ends, default=0) or 1
    for place, end in zip(places, ends, strict=True):
        unknown = all(series.values[place] is None for series in chart.series)
        text = "unknown" if unknown else _short(round(end, 2))
        axes.text(end + most * 0.008, place, text, va="center", fontsize=8.5)
    axes.set_yticks(list(places), [_cut(name) for name in chart.names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(chart.names) - 0.5, -0.5)
    axes.set_xlim(0, most * 1.12)
    axes.set_xlabel(chart.unit)
    axes.grid(axis="x")
    _count_axis(axes.xaxis, ends)
    if len(chart.series) > 1:
        axes.legend(**_ABOVE)
    return figure


def _stack(bar: Callable[..., Any], chart: Bars, width: float) -> list[float]:
    """Draw each series behind the one before it, and return where the last one ends."""
    ends = [0.0] * len(chart.names)
    for number, series in enumerate(chart.series):
        values = [value or 0 for value in series.values]
        bar(range(len(ends)), values, width, ends, color=_SERIES[number], label=series.name)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    return ends


def _columns(chart: Bars) -> Figure:
    figure, (axes,) = _figure(2.3)
    places = list(range(len(chart.names)))
    ends = _stack(axes.bar, chart, 0.8)
    step = -(-len(places) // _MOST_LABELS)
    axes.set_xticks(places[::step], list(chart.names)[::step])
    axes.set_xlim(-0.6, max(len(places), 4) - 0.4)
    axes.set_title(chart.unit)
    axes.grid(axis="y")
    _count_axis(axes.yaxis, ends)
    if len(chart.series) > 1:
        axes.legend(**_ABOVE)
    return figure


def _histogram(chart: Histogram) -> Figure:
    figure, (axes,) = _figure(1.9)
    counts = [count for _, _, count in chart.slots]
    places = list(range(len(counts)))
    axes.bar(places, counts, width=0.94, align="edge", color=_SERIES[0])
    for place, count in zip(places, counts, strict=True):
        if count:
            axes.text(place + 0.47, count, _short(count), ha="center", va="bottom", fontsize=7.5)
    bounds = [*(first for first, _, _ in chart.slots), chart.slots[-1][1]]
    step = -(-len(bounds) // 14)
    axes.set_xticks([*places, len(places)][::step], [chart.text(b) for b in bounds][::step])
    axes.set_xlim(-0.2, max(len(places), 6) + 0.2)
    axes.set_ylim(0, max(counts) * 1.15)
    axes.set_title("how many, by " + ("duration" if chart.unit == "ns" else chart.unit))
    axes.grid(axis="y")
    _count_axis(axes.yaxis, counts)
    return figure


def _matrix(chart: Matrix) -> Figure:
    size = len(chart.names)
    figure, (axes,) = _figure(0.55 + 0.3 * size)
    most = max((count for row in chart.rows for count in row if count), default=1)
    for y, row in enumerate(chart.rows):
        for x, count in enumerate(row):
            if count is None:
                continue
            part = 0.08 + 0.47 * count / most if count else 0.03
            axes.barh(y, 0.94, left=x - 0.47, height=0.9, color=_SERIES[0], alpha=part)
            axes.text(x, y, _short(count), ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.5, max(size, 6) - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    labels = [f"{_cut(name)}  {number}" for number, name in enumerate(chart.names, 1)]
    axes.set_yticks(range(size), labels)
    axes.set_xticks(range(size), [str(number) for number in range(1, size + 1)])
    axes.tick_params(length=0, labelbottom=False, labeltop=True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(chart.unit)
    return figure


def _cut(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
