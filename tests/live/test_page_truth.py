"""Page truth on the running kernel, against what KSM counts for each process."""

import numpy as np
import pytest

from ksmtrace.kernel.page_truth import read_page_truth
from ksmtrace.kernel.procfs import read_ksm_stat
from ksmtrace.kernel.sysfs import read_ksm

pytestmark = pytest.mark.live


def test_every_ksm_page_is_counted_and_every_counted_page_is_one(live, clean) -> None:
    workload = live.workload("duplicates", "--pages", "503", "--contents", "11")
    with live.holding(*workload, "--max-page-sharing", "19"):
        truth = read_page_truth()
        pages = truth.pages
        merged = pages[pages["is_ksm"] == 1]
        pids = np.unique(truth.ranges["pid"]).tolist()
        counted = {pid: (read_ksm_stat(pid) or {}).get("ksm_merging_pages") for pid in pids}
        ksm = read_ksm()

    assert truth.nr_vanished == truth.nr_moved == truth.nr_swapped == 0
    assert len(pages) == 3 * 503
    frames = truth.merged_frames()
    # Where KPF_KSM lies, smaps settles it: every page of these mappings is merged.
    assert {pid: int((merged["pid"] == pid).sum()) for pid in pids} == counted
    assert len(frames) == ksm["pages_shared"]
    assert int(frames["nr_pages"].sum()) == ksm["pages_shared"] + ksm["pages_sharing"]
    assert (frames["nr_pages"] == frames["mapcount"]).all()
    assert frames["nr_pages"].max() == 19
