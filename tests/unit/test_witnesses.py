"""Every cause by itself, over the memory of a real kernel and pages made to fit it."""

import dataclasses
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.kernel.ksm_memory import ItemState, read_ksm_memory
from ksmtrace.kernel.page_truth import PAGE_DTYPE, RANGE_DTYPE, PageTruth
from ksmtrace.kernel.probes import KpfProbe
from ksmtrace.kernel.witnesses import Cause, compare_witnesses

GOLDEN = Path(__file__).parents[1] / "golden/kcore/7.x"
ORDINARY = 999_983


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    tree = tmp_path_factory.mktemp("kernel") / "7.x"
    shutil.copytree(GOLDEN, tree)
    (tree / "proc/kcore").write_bytes(lzma.decompress((tree / "proc/kcore.xz").read_bytes()))
    return read_ksm_memory(tree)


@pytest.fixture(params=[True, False], ids=["trusted", "lying"])
def pages(request, memory):
    """What both processes map, if nothing changed since: the frames of the memory's nodes."""
    nodes = dict(
        zip(
            memory.stable_nodes["stable_node"].tolist(),
            memory.stable_nodes["kpfn"].tolist(),
            strict=True,
        )
    )
    pids = dict(
        zip(memory.mm_slots["mm_slot"].tolist(), memory.mm_slots["pid"].tolist(), strict=True)
    )
    items = memory.rmap_items
    found = np.zeros(len(items), PAGE_DTYPE)
    found["pid"] = [pids[slot] for slot in items["mm_slot"].tolist()]
    found["address"] = items["address"]
    stable = items["state"] == ItemState.STABLE
    found["pfn"] = [
        nodes.get(node, ORDINARY - 1 - index)
        for index, node in enumerate(items["stable_node"].tolist())
    ]
    found["is_ksm"] = stable if request.param else -1
    ranges = [
        (pid, min(mine["address"]), max(mine["address"]) + 4096)
        for pid in pids.values()
        for mine in [found[found["pid"] == pid]]
    ]
    return PageTruth(
        np.array(ranges, RANGE_DTYPE),
        found,
        KpfProbe(request.param, ""),
        *(2, 0, 0, 0),
    )


def is_trusted(pages):
    return bool(pages.kpf_ksm.truthful)


def with_page(pages, index, **values):
    found = pages.pages.copy()
    for name, value in values.items():
        found[name][index] = value
    return dataclasses.replace(pages, pages=found)


def without_page(pages, index):
    return dataclasses.replace(pages, pages=np.delete(pages.pages, index))


def causes(memory, pages):
    return [Cause(cause) for cause in compare_witnesses(memory, pages)["cause"].tolist()]


@pytest.fixture(scope="module")
def stable(memory):
    return int(np.flatnonzero(memory.rmap_items["state"] == ItemState.STABLE)[4])


def test_both_say_the_same(memory, pages):
    assert causes(memory, pages) == []


def test_a_difference_says_where_and_what(memory, pages, stable):
    [found] = compare_witnesses(memory, with_page(pages, stable, pfn=ORDINARY, is_ksm=0))
    page = pages.pages[stable]

    assert (found["pid"], found["address"]) == (page["pid"], page["address"])
    assert (found["kpfn"], found["pfn"]) == (page["pfn"], ORDINARY)
    assert found["rmap_item"] == memory.rmap_items["rmap_item"][stable]
    assert found["cause"] == Cause.WRITTEN


def test_exited(memory, pages, stable):
    slots = memory.mm_slots.copy()
    slots["mm_users"][1], slots["pid"][1] = 0, -1
    pid = memory.mm_slots["pid"][1]
    gone = dataclasses.replace(
        pages,
        pages=pages.pages[pages.pages["pid"] != pid],
        ranges=pages.ranges[pages.ranges["pid"] != pid],
    )
    found = causes(dataclasses.replace(memory, mm_slots=slots), gone)

    assert found == [Cause.EXITED] * int(memory.mm_slots["ksm_merging_pages"][1])
    # Without the kernel's word for it, it is no more than a process that was not read.
    assert set(causes(memory, gone)) == {Cause.NOT_READ}


def test_unmapped_or_no_longer_mergeable(memory, pages, stable):
    pid, address = pages.pages["pid"][stable], pages.pages["address"][stable]
    ranges = []
    for owner, start, end in pages.ranges.tolist():
        ranges += (
            [(owner, start, int(address)), (owner, int(address) + 4096, end)]
            if (owner == pid)
            else [(owner, start, end)]
        )
    split = dataclasses.replace(without_page(pages, stable), ranges=np.array(ranges, RANGE_DTYPE))
    assert causes(memory, split) == [Cause.UNMERGED]


def test_dropped(memory, pages, stable):
    assert causes(memory, without_page(pages, stable)) == [Cause.DROPPED]


def test_written(memory, pages, stable):
    flag = 0 if is_trusted(pages) else -1
    assert causes(memory, with_page(pages, stable, pfn=ORDINARY, is_ksm=flag)) == [Cause.WRITTEN]


def test_written_in_place_by_the_last_sharer(memory, pages, stable):
    nodes = memory.stable_nodes.copy()
    head = memory.rmap_items["stable_node"][stable]
    nodes["is_current"][nodes["stable_node"] == head] = 0
    sharers = np.flatnonzero(memory.rmap_items["stable_node"] == head)
    found = causes(
        dataclasses.replace(memory, stable_nodes=nodes), with_page(pages, sharers, is_ksm=0)
    )
    assert found == [Cause.WRITTEN] * 3


def test_the_page_of_another_node(memory, pages, stable):
    other = int(memory.stable_nodes["kpfn"][-1])
    assert other != pages.pages["pfn"][stable]
    assert causes(memory, with_page(pages, stable, pfn=other)) == [Cause.OTHER_NODE]


def test_forked(memory, pages):
    child = pages.pages.copy()
    child["pid"] = 30_011
    ranges = pages.ranges.copy()
    ranges["pid"] = 30_011
    both = dataclasses.replace(
        pages,
        pages=np.concatenate([pages.pages, child]),
        ranges=np.concatenate([pages.ranges, ranges]),
    )
    assert causes(memory, both) == [Cause.NOT_SCANNED] * 45


def test_taken_off_its_node(memory, pages, stable):
    items = memory.rmap_items.copy()
    items["state"][stable] = ItemState.NONE
    [found] = compare_witnesses(dataclasses.replace(memory, rmap_items=items), pages)

    assert found["cause"] == Cause.DETACHED
    assert found["rmap_item"] == items["rmap_item"][stable]
    assert found["kpfn"] == 0


def test_a_ksm_page_that_no_node_has(memory, pages):
    unstable = int(np.flatnonzero(memory.rmap_items["state"] == ItemState.UNSTABLE)[0])
    # Where KPF_KSM lies there is no telling.
    flag, expected = (1, [Cause.NO_NODE]) if is_trusted(pages) else (-1, [])
    assert causes(memory, with_page(pages, unstable, is_ksm=flag)) == expected


def test_what_has_no_explanation(memory, pages, stable):
    # Its current node's page, and not flagged; and another KSM page that no node has.
    assert causes(memory, with_page(pages, stable, is_ksm=0)) == [Cause.CONTRADICTION]
    if is_trusted(pages):
        found = causes(memory, with_page(pages, stable, pfn=ORDINARY, is_ksm=1))
        assert found == [Cause.CONTRADICTION]
