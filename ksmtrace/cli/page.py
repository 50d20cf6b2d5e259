"""The report as one page of HTML: no script, nothing from the network, every name escaped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ksmtrace.cli.charts import Absent
from ksmtrace.cli.sections import Section
from ksmtrace.cli.table import columns
from ksmtrace.units import text_bytes, text_duration, text_share

_TEXT_COLUMNS = 118
_STYLE = """
:root {
  color-scheme: light dark;
  --text: #1c2024; --dim: #5a636d; --line: #d5d9de; --ground: #fff; --box: #f5f7f9;
  --good: #1a7f4b; --bad: #b3361b;
  --series-1: #0072b2; --series-2: #d55e00; --series-3: #009e73;
  --series-4: #cc79a7; --series-5: #56b4e9; --series-6: #e69f00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e4e7ea; --dim: #9aa4ae; --line: #3a424a; --ground: #14181c; --box: #1d2328;
    --good: #4cc38a; --bad: #ff8b6b;
    --series-1: #4aa3df; --series-2: #f08a4b; --series-3: #35c29a;
    --series-4: #e0a0c6; --series-5: #8fd0f5; --series-6: #f2bd4f;
  }
}
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: var(--ground);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .2rem; }
p { margin: .3rem 0; }
a { color: var(--series-1); }
nav { margin: 1rem 0; }
nav a { margin-right: .9rem; white-space: nowrap; }
.dim, figcaption, .absent { color: var(--dim); }
.whole, .part { font-weight: 600; }
.whole { color: var(--good); }
.part { color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .7rem;
  margin: 1rem 0; }
dl div { background: var(--box); border-radius: 6px; padding: .6rem .8rem; }
dt { color: var(--dim); font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; }
dd small { display: block; color: var(--dim); font-size: .8rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif; }
pre { background: var(--box); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto;
  font: 12.5px/1.45 ui-monospace, monospace; }
"""


def make_page(
    file: Path,
    heading: Sequence[str],
    content: dict[str, Any],
    sections: Sequence[Section],
    everything: bool,
) -> str:
    """Write the page.

    Args:
        file: the recording, to be named.
        heading: the report's head as text.
        content: what make_report returns.
        sections: those that are asked for.
        everything: leave no row of their tables out.
    """
    return "\n".join(_page(file, heading, content, sections, everything)) + "\n"


def _page(
    file: Path,
    heading: Sequence[str],
    content: dict[str, Any],
    sections: Sequence[Section],
    everything: bool,
) -> Iterator[str]:
    title = f"KSM: {file.name}"
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    # Whatever a name of the recording might smuggle in, nothing is loaded and nothing runs.
    yield (
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    )
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    yield f"<header><h1>{escape(title)}</h1>"
    started = time.localtime(content["started_realtime_ns"] // 1_000_000_000)
    yield (
        f'<p class="dim">Linux {escape(str((content["kernel"] or {}).get("release")))}, '
        f"{text_duration(content['duration_ns'])} from "
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z', started)}</p>"
    )
    kept = "whole" if content["complete"] else "part"
    for line in heading[1:]:
        what = kept if line.startswith(("COMPLETE", "INCOMPLETE")) else "dim"
        yield f'<p class="{what}">{escape(line)}</p>'
    yield "</header><main>"
    yield from _tiles(content)
    yield '<nav aria-label="Sections">'
    yield from (f'<a href="#{section.name}">{escape(section.title)}</a>' for section in sections)
    yield "</nav>"
    for section in sections:
        yield from _section(section, content, everything)
    yield "</main></body></html>"


def _tiles(content: dict[str, Any]) -> Iterator[str]:
    """Write the few numbers that people ask for first."""
    counters = {entry["counter"]: entry for entry in content["counters"]}
    merges, ksmd = content["merges"], content["ksmd"] or {}
    yield "<dl>"
    profit = counters.get("general_profit", {}).get("last")
    sharing = counters.get("pages_sharing", {}).get("last")
    yield _tile(
        "general_profit at the end",
        "absent" if profit is None else text_bytes(profit),
        "no sample" if sharing is None else f"{sharing:,} pages_sharing",
    )
    if merges is None:
        yield _tile("pages merged", "not visible", "on this kernel")
    else:
        rate = merges["success_rate"]
        of = f"of {merges['attempts']:,} attempts"
        yield _tile(
            "pages merged",
            f"{merges['succeeded']:,}",
            of if rate is None else f"{of} ({text_share(rate)})",
        )
    scans = content["scans"]
    longest = (scans or {}).get("longest_duration_ns")
    yield _tile(
        "passes of ksmd",
        "not visible" if scans is None else f"{scans['completed']:,}",
        "none complete" if longest is None else f"the longest took {text_duration(longest)}",
    )
    if "cpu_ns" in ksmd:
        share = ksmd["cpu_ns"] / max(ksmd["elapsed_ns"], 1)
        yield _tile(
            "CPU time of ksmd", text_duration(ksmd["cpu_ns"]), f"{text_share(share)} of one CPU"
        )
    copied = counters.get("cow_ksm", {}).get("delta")
    yield _tile(
        "copied again on write",
        "absent" if copied is None else f"{copied:,}",
        "pages, by cow_ksm",
    )
    yield "</dl>"


def _tile(what: str, value: str, more: str) -> str:
    return (
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
    )


def _section(section: Section, content: dict[str, Any], everything: bool) -> Iterator[str]:
    from ksmtrace.cli.plots import draw

    yield f'<section id="{section.name}"><h2>{escape(section.title)}</h2>'
    for number, chart in enumerate(section.charts(content) if section.charts else ()):
        yield f"<h3>{escape(chart.title)}</h3>"
        if isinstance(chart, Absent):
            yield f'<p class="absent">Not drawn: {escape(chart.why)}.</p>'
        else:
            yield f"<figure>{draw(chart, f'{section.name}-{number}')}</figure>"
    with columns(_TEXT_COLUMNS):
        text = "\n".join(section.text(content, everything))
    yield f'<pre tabindex="0" aria-label="{escape(section.title)}, as text">{escape(text)}</pre>'
    yield "</section>"
