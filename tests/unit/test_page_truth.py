import dataclasses

import numpy as np
import pytest

from ksmtrace.errors import KernelFeatureMissing, PrivilegeMissing
from ksmtrace.kernel import page_truth
from ksmtrace.kernel.page_truth import read_page_truth
from ksmtrace.kernel.pages import KPF_BITS, PM_PRESENT, PM_SWAP
from ksmtrace.kernel.probes import KpfProbe

PAGE = 4096
TRUSTED, LYING = KpfProbe(True, "as it should be"), KpfProbe(False, "set for every page")
ANON, KSM = 1 << KPF_BITS["ANON"], 1 << KPF_BITS["KSM"]
ZERO, TAIL = 1 << KPF_BITS["ZERO_PAGE"], 1 << KPF_BITS["COMPOUND_TAIL"]


class Proc:
    """A /proc with files as long as the places that are asked for."""

    def __init__(self, root):
        self.root = root
        (root / "proc").mkdir()
        self.frame(0, 0, 0)

    def process(self, pid, *mappings, ksm_stat=b"ksm_rmap_items 0\n"):
        directory = self.root / "proc" / str(pid)
        directory.mkdir()
        smaps, pagemap = "", np.zeros(0x200, np.uint64)
        for start, entries, flags, *ksm_pages in mappings:
            end = start + len(entries) * PAGE
            smaps += f"{start:08x}-{end:08x} rw-p 00000000 00:00 0\n"
            smaps += "".join(f"KSM: {4 * number} kB\n" for number in ksm_pages)
            smaps += f"VmFlags: rd wr {flags}\n"
            pagemap[start // PAGE : end // PAGE] = entries
        (directory / "ksm_stat").write_bytes(ksm_stat)
        (directory / "smaps").write_text(smaps)
        (directory / "pagemap").write_bytes(pagemap.tobytes())

    def frame(self, pfn, flags, mapcount):
        for name, value in (("kpageflags", flags), ("kpagecount", mapcount)):
            path = self.root / "proc" / name
            words = np.zeros(100, np.uint64)
            if path.exists():
                words = np.fromfile(path, np.uint64)
            words[pfn] = value
            words.tofile(path)


def at(*pfns):
    return [PM_PRESENT | pfn if pfn else 0 for pfn in pfns]


@pytest.fixture
def proc(tmp_path):
    """Two processes that share frame 11 and 13 merged, 17 by fork; 12 and 14 are their own."""
    proc = Proc(tmp_path)
    proc.process(7, (0x10000, at(11, 12, 0, 13, 17), "mg"), (0x20000, at(19), "nh"))
    proc.process(5, (0x30000, at(11, 14), "mg nh"), (0x40000, [*at(13, 17, 11), PM_SWAP], "mg"))
    proc.process(9, (0x10000, at(23), "nh"))
    for pfn, flags, mapcount in (
        *((11, ANON | KSM, 3), (13, ANON | KSM, 2), (12, ANON, 1), (14, ANON, 1)),
        *((17, ANON, 2), (19, ANON, 1), (23, ANON, 1)),
    ):
        proc.frame(pfn, flags, mapcount)
    return proc


def places(pages):
    return [(int(p["pid"]), int(p["address"]), int(p["pfn"]), int(p["is_ksm"])) for p in pages]


def test_every_present_page_of_mergeable_mappings(proc):
    truth = read_page_truth(kpf_ksm=TRUSTED, root=proc.root)

    assert places(truth.pages) == [
        *((5, 0x30000, 11, 1), (5, 0x31000, 14, 0), (5, 0x40000, 13, 1), (5, 0x41000, 17, 0)),
        *((5, 0x42000, 11, 1), (7, 0x10000, 11, 1), (7, 0x11000, 12, 0), (7, 0x13000, 13, 1)),
        (7, 0x14000, 17, 0),
    ]
    assert truth.ranges.tolist() == [
        *((5, 0x30000, 0x32000), (5, 0x40000, 0x44000), (7, 0x10000, 0x15000)),
    ]
    assert truth.pages["mapcount"].tolist() == [3, 1, 2, 2, 3, 3, 1, 2, 2]
    assert (truth.nr_processes, truth.nr_vanished, truth.nr_swapped, truth.nr_moved) == (2, 0, 1, 0)


def test_places_grouped_by_frame(proc):
    truth = read_page_truth(kpf_ksm=TRUSTED, root=proc.root)
    frames, ordered = truth.frames(), truth.pages_by_frame()

    assert frames[["pfn", "nr_pages", "mapcount"]].tolist() == [
        *((11, 3, 3), (12, 1, 1), (13, 2, 2), (14, 1, 1), (17, 2, 2)),
    ]
    eleven = ordered[int(frames["first"][0]) :][: int(frames["nr_pages"][0])]
    assert places(eleven) == [(5, 0x30000, 11, 1), (5, 0x42000, 11, 1), (7, 0x10000, 11, 1)]
    assert truth.merged_frames()["pfn"].tolist() == [11, 13]


def test_where_the_flag_is_set_for_every_anonymous_page(proc):
    for pfn in (12, 14, 17):
        proc.frame(pfn, ANON | KSM, 2)
    proc.frame(14, ZERO, 5)
    proc.frame(12, ANON | KSM | TAIL, 2)
    truth = read_page_truth(kpf_ksm=LYING, root=proc.root)

    assert truth.kpf_ksm is LYING
    assert sorted(set(zip(*(truth.pages[n].tolist() for n in ("pfn", "is_ksm")), strict=True))) == [
        # One mm maps 11 twice, which nothing but KSM brings about.
        *((11, 1), (12, 0), (13, -1), (14, 0), (17, -1)),
    ]
    # What is mapped at several places: the fork's page among it.
    assert truth.merged_frames()["pfn"].tolist() == [11, 13, 17]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # In the second range of one 31 and 32 are left, of which one is a KSM page; 32 is the only
        # one in the other process, where none is.
        ((1, 1, 0), {31: 1, 32: 0, 33: 1, 34: -1}),
        ((1, 1, 1), {31: 0, 32: 1, 33: 1, 34: -1}),
        # Nothing is settled where only some of what is left can be, or the kernel does not count.
        ((0, 1, None), {31: -1, 32: -1, 33: 0, 34: -1}),
        ((None, None, None), {31: -1, 32: -1, 33: -1, 34: -1}),
    ],
)
def test_what_the_flag_does_not_tell_the_count_of_smaps_may_settle(tmp_path, counts, expected):
    proc = Proc(tmp_path)
    first, second, third = ([] if count is None else [count] for count in counts)
    proc.process(3, (0x10000, at(33), "mg", *first), (0x20000, at(31, 0, 32), "mg", *second))
    proc.process(4, (0x10000, at(32), "mg", *third), (0x20000, at(34, 34), "nh"))
    proc.process(6, (0x30000, at(34), "mg"))
    for pfn in expected:
        proc.frame(pfn, ANON | KSM, 1)
    pages = read_page_truth(kpf_ksm=LYING, root=proc.root).pages
    assert dict(zip(pages["pfn"].tolist(), pages["is_ksm"].tolist(), strict=False)) == expected


def test_a_process_that_vanishes_is_left_out_and_counted(proc, monkeypatch):
    (proc.root / "proc/7/pagemap").unlink()
    truth = read_page_truth(kpf_ksm=TRUSTED, root=proc.root)
    assert set(truth.pages["pid"]) == set(truth.ranges["pid"]) == {5}
    assert (truth.nr_processes, truth.nr_vanished) == (1, 1)

    # Gone between the first and the second look at it.
    real, reads = page_truth.read_pagemap, []

    def vanishing(pid, start, end, root):
        reads.append(pid)
        return None if len(reads) > 2 else real(pid, start, end, root)

    monkeypatch.setattr(page_truth, "read_pagemap", vanishing)
    truth = read_page_truth([5], TRUSTED, proc.root)
    assert len(truth.pages) == len(truth.ranges) == 0
    assert (truth.nr_processes, truth.nr_vanished) == (0, 1)


def test_a_page_that_moves_meanwhile_is_left_out_and_counted(proc, monkeypatch):
    real, reads = page_truth.read_pagemap, []

    def moving(pid, start, end, root):
        reads.append(pid)
        entries = real(pid, start, end, root).copy()
        if len(reads) > 1:
            entries[0] = PM_PRESENT | 29
            entries[3] = 0
        return entries

    monkeypatch.setattr(page_truth, "read_pagemap", moving)
    truth = read_page_truth([7], TRUSTED, proc.root)
    assert truth.pages["address"].tolist() == [0x11000, 0x14000]
    assert truth.nr_moved == 2


def test_smaps_is_not_read_where_the_kernel_says_that_nothing_is_mergeable(proc):
    stat = proc.root / "proc/7/ksm_stat"
    stat.write_bytes(b"ksm_rmap_items 4\nksm_merge_any: no\nksm_mergeable: no\n")
    assert set(read_page_truth(kpf_ksm=TRUSTED, root=proc.root).pages["pid"]) == {5}

    stat.write_bytes(b"ksm_rmap_items 4\nksm_merge_any: no\nksm_mergeable: yes\n")
    assert set(read_page_truth(kpf_ksm=TRUSTED, root=proc.root).pages["pid"]) == {5, 7}


def test_nobody_has_mergeable_memory(proc):
    truth = read_page_truth([9], TRUSTED, proc.root)

    assert len(truth.pages) == len(truth.ranges) == len(truth.frames()) == 0
    assert truth.nr_processes == 0


def test_hidden_frame_numbers_are_an_error(proc):
    proc.process(3, (0x10000, [PM_PRESENT, PM_PRESENT], "mg"))
    with pytest.raises(PrivilegeMissing, match="hides frame numbers"):
        read_page_truth([3], TRUSTED, proc.root)


def test_a_kernel_without_kpageflags(proc):
    (proc.root / "proc/kpageflags").unlink()
    with pytest.raises(KernelFeatureMissing):
        read_page_truth([5], TRUSTED, proc.root)


def test_the_result_cannot_be_replaced(proc):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_page_truth([5], TRUSTED, proc.root).nr_moved = 1
