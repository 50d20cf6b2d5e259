import dataclasses
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.errors import KernelFeatureMissing, PrivilegeMissing
from ksmtrace.kernel import kallsyms
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.kcore import Kcore
from ksmtrace.kernel.ksm_check import check_ksm_memory
from ksmtrace.kernel.ksm_layout import MEMBERS, OPTIONAL_MEMBERS, read_layout
from ksmtrace.kernel.ksm_memory import (
    STABLE_FLAG,
    UNSTABLE_FLAG,
    ItemState,
    KsmMemoryReader,
    NodeKind,
    read_ksm_memory,
)

GOLDEN = Path(__file__).parents[1] / "golden"
KERNELS = ("5.10", "6.18h", "7.x")


@pytest.fixture(scope="module", params=KERNELS)
def tree(request, tmp_path_factory):
    """A kernel with 3 contents on 16 pages each, 3 to a node, and 4 unique pages."""
    tree = tmp_path_factory.mktemp("kernel") / request.param
    shutil.copytree(GOLDEN / "kcore" / request.param, tree)
    packed = tree / "proc/kcore.xz"
    (tree / "proc/kcore").write_bytes(lzma.decompress(packed.read_bytes()))
    return tree


@pytest.fixture(scope="module")
def memory(tree):
    return read_ksm_memory(tree)


def test_what_the_kernel_held(memory):
    nodes, items = memory.stable_nodes, memory.rmap_items

    assert memory.consistent
    assert memory.attempts == 1
    assert nodes["kind"].tolist() == ([NodeKind.CHAIN] + [NodeKind.DUP] * 5) * 3
    assert (nodes["root"] == 0).all()
    dups = nodes[nodes["kind"] == NodeKind.DUP]
    assert set(dups["chain"]) == set(nodes["stable_node"][nodes["kind"] == NodeKind.CHAIN])
    assert (dups["rmap_hlist_len"] == 3).all()
    assert (dups["is_current"] == 1).all()
    assert (dups["kpfn"] > 0).all()
    assert len(set(dups["kpfn"])) == 15
    assert len(memory.sharers) == 45
    assert np.bincount(items["state"]).tolist() == [0, 7, 45]
    assert len(memory.unstable_nodes) == 7
    assert memory.mm_slots["comm"].tolist() == [b"golden 5", b"golden 11"]
    assert memory.mm_slots["nr_rmap_items"].tolist() == [17, 35]
    assert (memory.mm_slots["pid"] > 1).all()
    assert (memory.mm_slots["mm_users"] == 1).all()
    assert (items["address"] % 4096 == 0).all()
    assert memory.cursor.at_head


def test_sysfs_follows_from_the_variables(memory):
    values = memory.sysfs_values(4096)

    assert [values[f"pages_{name}"] for name in ("shared", "sharing", "unshared", "volatile")] == [
        *(15, 30, 7, 0)
    ]
    assert [values["stable_node_chains"], values["stable_node_dups"]] == [3, 15]
    assert values["full_scans"] == memory.cursor.seqnr > 0
    if "general_profit" in values:
        assert values["general_profit"] == 30 * 4096 - 52 * 64


def test_members_that_this_kernel_does_not_have_are_not_0(tree, memory):
    items = memory.rmap_items
    stable = items["state"] == ItemState.STABLE
    if tree.name == "5.10":
        assert (items["age"] == -1).all()
        assert (items["oldchecksum"] >= 0).all()
        assert (memory.mm_slots["ksm_merging_pages"] == -1).all()
        assert memory.counters["ksm_zero_pages"] is None
    else:
        if tree.name == "7.x":
            # A STABLE rmap_item has linear_page_index in their place.
            assert (items["age"][stable] == -1).all()
            assert (items["oldchecksum"][stable] == -1).all()
        # Without smart_scan ages do not grow.
        assert (items["age"][~stable] == 0).all()
        assert (items["oldchecksum"][~stable] > 0).all()
        assert memory.mm_slots["ksm_merging_pages"].tolist() == [
            int((stable & (items["mm"] == mm)).sum()) for mm in memory.mm_slots["mm"]
        ]


def test_arrays_cannot_be_written_to(memory):
    with pytest.raises(ValueError, match="read-only"):
        memory.stable_nodes["kpfn"] = 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_layout_of_a_kernel(kernel):
    layout = read_layout(Btf.read(GOLDEN / "kcore" / kernel))

    assert [layout["rmap_item.head"], layout["rmap_item.hlist"]] == [40, 48]
    assert [layout["stable_node.list"], layout["stable_node.rmap_hlist_len"]] == [24, 56]
    # Of two structs called mm_slot, 5.10 needs the one of mm/ksm.c.
    assert [layout[f"mm_slot.{name}"] for name in ("mm_list", "mm", "rmap_list")] == (
        [16, 40, 32] if kernel == "5.10" else [16, 32, 40]
    )
    assert {name for name, offset in layout.offsets.items() if offset is None} <= OPTIONAL_MEMBERS
    assert layout.offsets.keys() == MEMBERS.keys()


def changed(array, index, **values):
    copy = array.copy()
    for name, value in values.items():
        copy[name][index] = value
    return copy


def tampered(memory, what, index, **values):
    return dataclasses.replace(memory, **{what: changed(getattr(memory, what), index, **values)})


def test_a_sound_memory_has_no_contradiction(memory):
    assert check_ksm_memory(memory) == []


def only(found, *beginnings):
    rest = [line for line in found if not any(text in line for text in beginnings)]
    missing = [text for text in beginnings if not any(text in line for line in found)]
    return (missing, rest)


def test_a_wrong_length_is_found(memory):
    address = int(memory.stable_nodes["stable_node"][2])
    found = check_ksm_memory(tampered(memory, "stable_nodes", 2, rmap_hlist_len=4))

    assert found == [
        "rmap_hlist_len adds up to 46, and 45 items are STABLE",
        "1 stable_nodes have a rmap_hlist_len that is not their hlist's length: "
        f"first {address:#x} says 4 and has 3",
    ]


def test_a_missing_sharer_is_found(memory):
    address = int(memory.sharers["rmap_item"][7])
    found = check_ksm_memory(dataclasses.replace(memory, sharers=np.delete(memory.sharers, 7)))

    assert only(
        found, "not their hlist's length", f"on no stable_node's hlist: first {address:#x}"
    ) == (
        [],
        [],
    )


@pytest.mark.parametrize(
    ("what", "index", "values", "lines"),
    [
        ("stable_nodes", 1, {"head": 0xFFFF_8880_0000_0000}, ["marked dup or linked so"]),
        ("stable_nodes", 1, {"nid": 1}, ["another tree's nid"]),
        (
            "stable_nodes",
            1,
            {"kind": NodeKind.MIGRATING},
            ["marked dup", "marked migrating", "ksm_stable_node_dups is 15, and 14"],
        ),
        ("sharers", 5, {"rmap_item": 0x1000}, ["no mm's rmap_list", "on no stable_node's hlist"]),
        ("rmap_items", 0, {"mm": 0}, ["have no mm", "on another mm's"]),
        ("rmap_items", 3, {"address": 0x1000}, ["behind a lower address"]),
    ],
)
def test_what_does_not_fit_is_found(memory, what, index, values, lines):
    assert only(check_ksm_memory(tampered(memory, what, index, **values)), *lines) == ([], [])


def test_flags_that_do_not_fit_are_found(memory):
    items = memory.rmap_items
    stable = int(np.flatnonzero(items["state"] == ItemState.STABLE)[0])
    unstable = int(np.flatnonzero(items["state"] == ItemState.UNSTABLE)[0])

    found = check_ksm_memory(tampered(memory, "rmap_items", stable, flags=0))
    assert only(
        found, "ksm_pages_sharing is 30, and 29", "adds up to 45, and 44", "and are not STABLE"
    ) == ([], [])

    other = int(memory.stable_nodes["stable_node"][-1])
    head = int(items["stable_node"][stable])
    assert other != head
    found = check_ksm_memory(tampered(memory, "rmap_items", stable, stable_node=other))
    assert only(found, "that is not their head") == ([], [])

    both = STABLE_FLAG | UNSTABLE_FLAG
    found = check_ksm_memory(tampered(memory, "rmap_items", stable, flags=both))
    assert only(found, "both STABLE and UNSTABLE", "ksm_pages_unshared is 7, and 8") == ([], [])

    old = int(items["seqnr"][unstable]) - 1 & 0xFF
    found = check_ksm_memory(tampered(memory, "rmap_items", unstable, seqnr=old))
    assert only(found, "older than the last pass", "of another pass are in a tree") == ([], [])


def test_an_unstable_tree_that_lost_a_node_is_found(memory):
    fewer = memory.unstable_nodes[:-1]
    assert only(
        check_ksm_memory(dataclasses.replace(memory, unstable_nodes=fewer)),
        "of this pass are in no tree",
    ) == ([], [])
    # Within a pass nothing but that pass's rmap_items may be there.
    cursor = dataclasses.replace(
        memory.cursor, at_head=False, mm_slot=int(memory.mm_slots["mm_slot"][0])
    )
    inside = dataclasses.replace(memory, cursor=cursor)
    assert only(check_ksm_memory(inside), "7 UNSTABLE rmap_items of another pass") == ([], [])
    lost = dataclasses.replace(inside, unstable_nodes=fewer[:0], nr_unknown_unstable=1)
    assert only(check_ksm_memory(lost), "lead to 1 nodes that are no rmap_items") == ([], [])
    nowhere = dataclasses.replace(memory.cursor, at_head=False, mm_slot=0x1000)
    assert "the cursor is at mm_slot 0x1000, which is not on ksm_mm_head" in check_ksm_memory(
        dataclasses.replace(memory, cursor=nowhere)
    )


@pytest.mark.parametrize(
    ("counter", "line"),
    [
        ("ksm_pages_shared", "ksm_pages_shared is 16, and 15 are found"),
        ("ksm_pages_sharing", "ksm_pages_sharing is 31, and 30 are found"),
        ("ksm_rmap_items", "ksm_rmap_items is 53, and 52 are found"),
        ("ksm_stable_node_chains", "ksm_stable_node_chains is 4, and 3 are found"),
    ],
)
def test_a_counter_that_is_off_is_found(memory, counter, line):
    counters = {**memory.counters, counter: memory.counters[counter] + 1}

    assert check_ksm_memory(dataclasses.replace(memory, counters=counters)) == [line]


def poke(kcore, address, value):
    page = kcore._pages[address // 4096].tolist()
    page[address % 4096 // 8] = value
    kcore._pages[address // 4096] = memoryview(np.array(page, np.uint64).tobytes()).cast("Q")


# Kernel memory that is changed under the walk.
class Disturbed(Kcore):
    pokes: tuple[tuple[int, int], ...] = ()

    def forget(self):
        super().forget()
        for address, value in self.pokes:
            self.word(address)
            poke(self, address, value)


@pytest.fixture
def reader(tree):
    with KsmMemoryReader.open(tree) as reader:
        kcore = Disturbed.open(tree)
        reader.memory.close()
        reader.memory = kcore
        yield reader


@pytest.mark.parametrize("value", [0xDEAD_0000_0000_0122, 0x8, 0xFFFF_FFFF_FFFF_FFF8])
def test_a_poisoned_pointer_ends_its_list_and_is_told(reader, memory, value):
    item = int(memory.rmap_items["rmap_item"][20])
    reader.memory.pokes = ((item, value),)
    torn = reader.read()

    assert not torn.consistent
    assert torn.attempts == 3
    assert len(torn.rmap_items) == 21
    assert any(f"leads to {value:#x}, which is no kernel memory" in line for line in torn.torn)
    assert torn.torn[0] in check_ksm_memory(torn)


def test_a_list_in_circles_ends(reader, memory):
    items = memory.rmap_items["rmap_item"]
    reader.memory.pokes = ((int(items[20]), int(items[17])),)
    torn = reader.read()

    assert len(torn.rmap_items) == 21
    assert "goes in circles" in torn.torn[0]


def test_a_tree_in_circles_ends(reader, tree, memory):
    layout = read_layout(Btf.read(tree))
    chains = memory.stable_nodes[memory.stable_nodes["kind"] == NodeKind.CHAIN]
    root = int(chains["stable_node"][0])
    reader.memory.pokes = ((root + layout["rb_node.rb_left"], root),)

    assert "stable tree 0 goes in circles" in reader.read().torn[0]


def test_what_moves_meanwhile_is_told_and_read_again(reader, tree):
    layout = read_layout(Btf.read(tree))
    seqnr = reader.addresses["ksm_scan"] + layout["ksm_scan.seqnr"]
    readings = iter(range(1, 100))

    class Moving(Disturbed):
        def forget(self):
            Kcore.forget(self)
            now = next(readings)
            # Before and after the first reading, and before the second: then it rests.
            self.word(seqnr)
            poke(self, seqnr, 5000 + min(now, 3))

    reader.memory.__class__ = Moving
    settled = reader.read()
    assert settled.consistent
    assert settled.attempts == 2
    assert settled.cursor.seqnr == 5003

    readings = iter(range(1, 100))
    reader.memory.forget()
    restless = reader.read(attempts=1)
    assert restless.changed == ("ksm_scan.seqnr",)


def test_a_root_of_the_unstable_tree_that_leads_to_freed_memory(reader, memory):
    # As run=2 leaves it: no rmap_item is UNSTABLE, and the root is not reset.
    unstable = memory.rmap_items[memory.rmap_items["state"] == ItemState.UNSTABLE]
    reader.memory.pokes = tuple(
        (int(item["rmap_item"]) + 24, int(item["address"])) for item in unstable
    )
    found = reader.read()

    assert found.consistent
    assert len(found.unstable_nodes) == 0
    assert found.nr_unknown_unstable == 1
    assert check_ksm_memory(found) == ["ksm_pages_unshared is 7, and 0 are found"]


def test_a_kernel_that_has_no_kcore():
    with pytest.raises(KernelFeatureMissing) as raised:
        read_ksm_memory(GOLDEN / "trees/6.18h")

    assert "proc/kcore" in str(raised.value)
    assert "\n" not in f"{raised.value}{raised.value.hint}"
    assert "CONFIG_PROC_KCORE=y" in raised.value.hint


def test_hidden_addresses(tree, tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    shutil.copy(tree / "proc/kcore", tmp_path / "proc/kcore")
    text = (tree / "proc/kallsyms").read_text()
    (tmp_path / "proc/kallsyms").write_text(
        "".join(f"{0:016x}{line[16:]}\n" for line in text.splitlines())
    )
    with pytest.raises(PrivilegeMissing) as raised:
        read_ksm_memory(tmp_path)
    assert "kptr_restrict" in raised.value.hint

    def refuse(path, flags):
        raise PermissionError(13, "Permission denied")

    # A user without privileges is told of both.
    text = (tmp_path / "proc/kallsyms").read_bytes()
    monkeypatch.setattr(kallsyms, "read_file", lambda path: text)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PrivilegeMissing, match=r"hides addresses .* and .* EACCES"):
        read_ksm_memory(tmp_path)
