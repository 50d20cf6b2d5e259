"""What KSM saves, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Chart, Panel, Series, Timeline
from ksmtrace.cli.sections.words import exact, seconds
from ksmtrace.units import text_bytes, text_duration, text_share

_PAGE_BYTES = 4096
_MIB = 1 << 20


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    counters = {entry["counter"]: entry for entry in content["counters"]}
    yield "IS KSM PAYING?  (the kernel's counters at the last sample)"
    if not counters:
        yield "  unknown: there are no two samples"
        return
    sharing, zero = counters["pages_sharing"]["last"], counters["ksm_zero_pages"]["last"]
    profit = counters["general_profit"]["last"]
    saved = (sharing or 0) + (zero or 0)
    yield (
        f"  saved: {text_bytes(saved * _PAGE_BYTES)} ({exact(sharing)} pages_sharing"
        f"{'' if zero is None else f' + {zero:,} ksm_zero_pages'}); general_profit: "
        f"{'absent' if profit is None else text_bytes(profit)}"
    )
    broken = counters.get("cow_ksm", {}).get("delta")
    copied = "absent" if broken is None else f"{broken:,} pages"
    yield f"  copied again on write during the recording (cow_ksm): {copied}"
    ksmd = content["ksmd"] or {}
    if "cpu_ns" in ksmd:
        share = ksmd["cpu_ns"] / max(ksmd["elapsed_ns"], 1)
        each = (content["profit"]["yield"] or {}).get("cpu_ns_per_merged_page")
        of_all = not content["selection"] or content["selection"]["pids"] is None
        cost = f", {text_duration(each)} per merged page" if each and of_all else ""
        yield (
            f"  ksmd: {text_duration(ksmd['cpu_ns'])} of CPU ({text_share(share)} of one CPU), "
            f"waited {text_duration(ksmd['run_delay_ns'])} for one{cost}"
        )
    scanned = counters.get("pages_scanned", {}).get("delta")
    skipped = counters.get("pages_skipped", {}).get("delta")
    if scanned is not None or skipped is not None:
        yield (
            f"  pages scanned: {exact(scanned)}, skipped by smart_scan: {exact(skipped)}  (sampled)"
        )


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield what is saved over time, as the kernel counts it."""
    title = "What KSM saves, over time"
    history = content["history"]
    values = history["values"]
    if len(history["ts_ns"]) < 2 or "pages_sharing" not in values:
        yield Absent(title, "there are no two samples of the kernel's counters")
        return
    zero = values.get("ksm_zero_pages") or [0] * len(history["ts_ns"])
    saved = [
        None if one is None else (one + (other or 0)) * _PAGE_BYTES / _MIB
        for one, other in zip(values["pages_sharing"], zero, strict=True)
    ]
    series = [Series("pages_sharing and zero pages", saved)]
    if "general_profit" in values:
        profit = [None if one is None else one / _MIB for one in values["general_profit"]]
        series.append(Series("general_profit: less what rmap_items take", profit, dashed=True))
    yield Timeline(
        title,
        [seconds(content, ts_ns) for ts_ns in history["ts_ns"]],
        (Panel("MiB", tuple(series)),),
    )
