"""What a stream means: passes, merges, books, processes; as a report and as pandas frames.

What a notebook needs is here: :func:`open_recording`, :func:`between` and :func:`of_pids` for parts
of a recording, :func:`make_report`, and the frames; docs/analysis.md lists their columns.
"""

from ksmtrace.analysis.contention import df_holds, df_waits
from ksmtrace.analysis.costs import df_page_truth, df_profit
from ksmtrace.analysis.cows import df_cows
from ksmtrace.analysis.frames import (
    df_attempts,
    df_calls,
    df_counters,
    df_events,
    df_histograms,
    df_processes,
    df_routes,
    df_samples,
    df_sharing,
    df_tallies,
    open_recording,
)
from ksmtrace.analysis.merges import df_rates
from ksmtrace.analysis.migrations import df_moves
from ksmtrace.analysis.outcomes import df_failures, df_page_outcomes
from ksmtrace.analysis.passes import df_passes
from ksmtrace.analysis.races import df_walks
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.analysis.report import make_report
from ksmtrace.analysis.selection import between, of_pids

__all__ = [
    "Recorded",
    "between",
    "df_attempts",
    "df_calls",
    "df_counters",
    "df_cows",
    "df_events",
    "df_failures",
    "df_histograms",
    "df_holds",
    "df_moves",
    "df_page_outcomes",
    "df_page_truth",
    "df_passes",
    "df_processes",
    "df_profit",
    "df_rates",
    "df_routes",
    "df_samples",
    "df_sharing",
    "df_tallies",
    "df_waits",
    "df_walks",
    "make_report",
    "of_pids",
    "open_recording",
]
