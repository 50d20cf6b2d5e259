"""ksmd, one pass at a time.

A batch that may visit more pages than there are ends where the pass ends
(mm/ksm.c:ksm_do_scan), so with a large pages_to_scan each batch is exactly one pass from the
head of the list of mms, and between two batches ksmd sleeps sleep_millisecs
(mm/ksm.c:ksm_scan_thread). Setting run=0 in that pause leaves it at rest at the end of a pass:
counts of passes are exact, and so is what a page has gone through.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ksmtrace.errors import CannotRun
from ksmtrace.kernel.sysfs import read_ksm
from ksmtrace.workload.knobs import ADVISOR_OFF, SCAN, STOP, SavedKnobs
from ksmtrace.workload.registered import nr_rmap_items
from ksmtrace.workload.signals import Stop

# Any change of sleep_millisecs wakes ksmd at once (mm/ksm.c:sleep_millisecs_store), so two values
# take turns. Both are far longer than it takes to notice the end of a pass and to stop ksmd, also
# on a machine that lets this process wait for seconds.
_PAUSES_MS = (30_011, 30_013)
_FIRST_POLL_SECONDS = 0.0005
_LONGEST_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Unmet:
    """What a wait ended without.

    Attributes:
        waited_for: the condition, and what had been reached when the time was up.
    """

    waited_for: str


class Ksmd:
    """ksmd at rest between the calls; the knobs must be saved already."""

    def __init__(self, knobs: SavedKnobs, stop: Stop) -> None:
        self._knobs = knobs
        self._stop = stop
        self._nr_pauses = 0
        self.nr_passes = 0
        """Passes so far, of those that :meth:`run_pass` asked for."""

    def rest(self) -> None:
        """Stop ksmd; when this returns, no batch is under way (mm/ksm.c:run_store)."""
        self._knobs.set(run=STOP)

    def take_over(self, smart_scan: bool) -> None:
        """Stop ksmd and set the knobs that make a batch a whole pass.

        Args:
            smart_scan: leave that knob as it is, instead of switching it off.
        """
        self.rest()
        if "advisor_mode" in self._knobs:
            self._knobs.set(advisor_mode=ADVISOR_OFF)
        if "smart_scan" in self._knobs and not smart_scan:
            self._knobs.set(smart_scan=0)

    def budget(self, nr_pages: int) -> None:
        """Let a batch visit more pages than there are.

        Args:
            nr_pages: mergeable pages that a pass may meet.
        """
        self._knobs.set(pages_to_scan=2 * nr_pages + 100_003)

    def run_pass(
        self, timeout_seconds: float, ends_early: Callable[[], bool] | None = None
    ) -> bool:
        """Let ksmd complete one pass, and rest again.

        Args:
            timeout_seconds: how long to wait for its end.
            ends_early: a condition that is as good as the end of the pass: ksmd, once it knows
                no process any more, does not count passes (mm/ksm.c:ksmd_should_run).

        Returns:
            False if the time was up first.

        Raises:
            Interrupted: a signal came; ksmd is left to whoever restores the knobs.
        """
        before = _full_scans()
        deadline = time.monotonic() + timeout_seconds
        # First the pause, then run: a ksmd woken by the pause must still find run=0, else the
        # new value could be noticed after the pass and cause a second one.
        self._knobs.set(sleep_millisecs=_PAUSES_MS[self._nr_pauses % 2])
        self._nr_pauses += 1
        self._knobs.set(run=SCAN)
        poll_seconds = _FIRST_POLL_SECONDS
        while _full_scans() == before and not (ends_early is not None and ends_early()):
            if time.monotonic() >= deadline:
                self.rest()
                return False
            self._stop.pause(poll_seconds)
            poll_seconds = min(poll_seconds * 1.5, _LONGEST_POLL_SECONDS)
        self.rest()
        self.nr_passes += _full_scans() - before
        return True

    def forget(self, timeout_seconds: float) -> Unmet | None:
        """Let ksmd visit what exited processes left, until it knows no page any more.

        For a machine on which nobody else uses KSM. Stable nodes without sharers, which a pass
        may leave in the tree, go too: by a change of max_page_sharing and back
        (mm/ksm.c:max_page_sharing_store), which unlike run=2 leaves full_scans alone.

        Returns:
            None once nothing is left, else what is.
        """
        deadline = time.monotonic() + timeout_seconds
        while (left := nr_rmap_items(read_ksm())) > 0:
            seconds = deadline - time.monotonic()
            if seconds <= 0 or not self.run_pass(
                seconds, ends_early=lambda: nr_rmap_items(read_ksm()) <= 0
            ):
                return Unmet(f"ksmd to forget the pages of exited processes (now {left} left)")
        if "max_page_sharing" in self._knobs:
            limit = read_ksm()["max_page_sharing"]
            assert isinstance(limit, int)
            try:
                self._knobs.set(max_page_sharing=limit + 1)
                self._knobs.set(max_page_sharing=limit)
            except CannotRun as error:
                return Unmet(f"the stable tree to be empty ({error})")
        return None


def _full_scans() -> int:
    full_scans = read_ksm()["full_scans"]
    assert isinstance(full_scans, int)
    return full_scans
