"""The passes of ksmd over all mergeable memory."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ksmtrace.analysis.merges import find_merges
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.events import KIND_BY_NAME, EventFlag, of_kind

_START = KIND_BY_NAME["ksm_start_scan"].number


def df_passes(recorded: Recorded) -> pd.DataFrame:
    """List the passes, one row each, in order.

    Returns:
        Columns: ``seq`` (ksm_scan.seqnr, Int64); ``begin_ns`` and ``end_ns`` (CLOCK_MONOTONIC;
        NA where the recording has only the other end: the pass was under way at the start or at
        the end, was interrupted by run=2, or an event is lost); ``duration_ns``;
        ``rmap_entries`` (rmap_items at the end: pages that the pass visited or skipped);
        ``cpu_ns`` and ``run_delay_ns`` (of ksmd during the pass, to within a tick; NA where the
        kernel does not tell); ``merged`` (pages merged in it, int64).
    """
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
    passes["merged"] = _merged(recorded, passes)
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


def _merged(recorded: Recorded, passes: pd.DataFrame) -> np.ndarray:
    merges = find_merges(recorded)
    times = np.sort(merges.events["ts_ns"][merges.appended])
    # A pass without a begin lasts from the end of the one before, and one without an end until
    # the next one begins.
    begins = passes["begin_ns"].fillna(passes["end_ns"].shift(1)).fillna(0).to_numpy(np.uint64)
    ends = passes["end_ns"].fillna(passes["begin_ns"].shift(-1)).fillna(np.iinfo(np.int64).max)
    counts: np.ndarray = np.searchsorted(times, ends.to_numpy(np.uint64)) - np.searchsorted(
        times, begins
    )
    return counts
