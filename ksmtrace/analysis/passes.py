"""The passes of ksmd over all mergeable memory."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ksmtrace.analysis.merges import find_merges
from ksmtrace.analysis.recorded import EVER_NS, Recorded, has_flag
from ksmtrace.events import KIND_BY_NAME, EventFlag, of_kind

_START = KIND_BY_NAME["ksm_start_scan"].number

_TICK_NS = 4_000_000  # CONFIG_HZ=250, as Debian has it
_LEAST_TICKS = 10


def find_speed(rmap_entries: int, cpu_ns: int, passes: int) -> float | None:
    """Return how many pages per second of its CPU time ksmd went through in whole passes.

    ksmd sleeps after a pass, and so each pass can lack the CPU time of its last tick.

    Returns:
        None where that may be more than a tenth of the time: ten times too fast is no answer.
    """
    if not passes or cpu_ns < passes * _LEAST_TICKS * _TICK_NS:
        return None
    return rmap_entries / (cpu_ns / 1e9)


def df_passes(recorded: Recorded) -> pd.DataFrame:
    """List the passes, one row each, in order; of a span those that were under way in it.

    Returns:
        The columns of :data:`ksmtrace.analysis.frames.FRAMES`. A begin or end is NA where the
        recording has only the other one: the pass was under way at the start or at the end, was
        interrupted by run=2, or an event is lost. A pass that the span cuts keeps its own
        figures, but for ``merged``.
    """
    passes = _whole_passes(recorded.whole())
    # A pass without a begin lasts from the end of the one before, and one without an end until
    # the next one begins.
    begins = passes["begin_ns"].fillna(passes["end_ns"].shift(1)).fillna(0).to_numpy(np.uint64)
    next_begins = passes["begin_ns"].shift(-1)
    ends = passes["end_ns"].fillna(next_begins).fillna(EVER_NS).to_numpy(np.uint64)
    merges = find_merges(recorded)
    times = np.sort(merges.events["ts_ns"][merges.appended])
    passes["cut"] = False
    passes["merged"] = np.searchsorted(times, ends) - np.searchsorted(times, begins)
    span = recorded.selection
    if span is None:
        return passes
    early, late = passes["begin_ns"] < span.low_ns, passes["end_ns"] >= span.high_ns
    passes["cut"] = early.fillna(False).astype(bool) | late.fillna(False).astype(bool)
    return passes[(begins < span.high_ns) & (ends >= span.low_ns)].reset_index(drop=True)


def _whole_passes(recorded: Recorded) -> pd.DataFrame:
    marks = of_kind(recorded.events, "ksm_start_scan", "ksm_stop_scan")
    counted = has_flag(marks, EventFlag.HAS_COUNTS)
    rows: list[dict[str, int | None]] = []
    begun: int | None = None
    for index, is_start in enumerate((marks["kind"] == _START).tolist()):
        if is_start:
            if begun is not None:
                rows.append(_row(marks, counted, begun, None))
            begun = index
        else:
            if begun is not None and marks["seq"][begun] != marks["seq"][index]:
                rows.append(_row(marks, counted, begun, None))
                begun = None
            rows.append(_row(marks, counted, begun, index))
            begun = None
    if begun is not None:
        rows.append(_row(marks, counted, begun, None))
    columns = ["seq", "begin_ns", "end_ns", "rmap_entries", "cpu_ns", "run_delay_ns"]
    passes = pd.DataFrame(rows, columns=columns).astype("Int64")
    passes.insert(3, "duration_ns", passes["end_ns"] - passes["begin_ns"])
    on_or_waiting = passes["cpu_ns"] + passes["run_delay_ns"]
    # ksmd's CPU time is behind by up to a tick: a short pass can seem to take more than it lasts.
    passes["off_cpu_ns"] = (passes["duration_ns"] - on_or_waiting).clip(lower=0)
    return passes


def _row(
    marks: np.ndarray, counted: np.ndarray, begin: int | None, end: int | None
) -> dict[str, int | None]:
    row: dict[str, int | None] = {
        "seq": int(marks["seq"][begin if end is None else end]),
        "begin_ns": None if begin is None else int(marks["ts_ns"][begin]),
        "end_ns": None if end is None else int(marks["ts_ns"][end]),
        "rmap_entries": None if end is None else int(marks["rmap_entries"][end]),
    }
    if begin is not None and end is not None and counted[begin] and counted[end]:
        row["cpu_ns"] = int(marks["ksmd_cpu_ns"][end]) - int(marks["ksmd_cpu_ns"][begin])
        row["run_delay_ns"] = int(marks["ksmd_run_delay_ns"][end]) - int(
            marks["ksmd_run_delay_ns"][begin]
        )
    return row
