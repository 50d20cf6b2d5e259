import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.facts import FUNCTIONS, OFFSETS

TREES = Path(__file__).parents[1] / "golden/trees"
BLOBS = {
    kernel: (TREES / kernel / "sys/kernel/btf/vmlinux").read_bytes()
    for kernel in ("5.10", "6.1", "6.12", "6.18h")
}


# As `bpftool btf dump` and `pahole` print them for the whole vmlinux.
@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("5.10", [64, 0, 8, 912, None, None, None, 120, 0, 8, 36, 2236, 200, 1952]),
        ("6.1", [16, 8, 16, 928, 1048, 1056, None, 112, 0, 8, 44, 2420, 200, 2168]),
        ("6.12", [16, 8, 16, 1144, 1264, 1272, 1280, 168, 0, 8, 44, 2436, 224, 2200]),
        ("6.18h", [16, 8, 16, 1296, 1416, 1424, 1432, 184, 0, 8, 44, 1268, 232, 1016]),
    ],
)
def test_offsets_of_every_member_that_the_programs_read(kernel, expected):
    vm_mm, page, addr, *others = expected
    skips = [36, 37] if kernel.startswith("6.1") and kernel != "6.1" else [None, None]
    # rmap_list of an item; ksm_scan; the slot's mm and rmap_list, where it is no struct mm_slot.
    item, *slot = [None] * 3 if kernel == "5.10" else [0, 32, 40]
    cursor = [item, 24, 0, 16, *slot]
    ksm = [24, 32, *skips, 16, 40, 48, 40, 8, 48, 56, 60, 0, *cursor]
    fault = [0, 24, 8, 48] if kernel == "5.10" else [0, 24, 40, 64]
    order = {"5.10": [17, None, None], "6.1": [17, 81, 64]}.get(kernel, [None, None, 64])
    large_mapcount = 80 if kernel.startswith("6.1") and kernel != "6.1" else None
    users = {"5.10": [92, 80], "6.1": [84, 72]}.get(kernel, [132, 120])
    state = [0, 52, 48, *order, large_mapcount, *users]
    delays = [None, None] if kernel == "5.10" else [400, 408]
    walked = [vm_mm, 24, 8, *fault, *delays, *state, 8, 40, page, addr]
    btf = Btf(BLOBS[kernel])

    assert [btf.offset(names, path) for names, path in OFFSETS.values()] == [
        *ksm,
        *walked,
        *others,
    ]


def test_a_page_without_a_mapping_leaves_it_to_the_folio():
    # struct page { unsigned long flags; }; struct folio { long; { unsigned long mapping; }; };
    strings = b"\0page\0flags\0folio\0mapping\0"
    page, flags, folio, mapping = (
        strings.index(b"\0" + name + b"\0") + 1
        for name in (b"page", b"flags", b"folio", b"mapping")
    )
    types = [
        *(page, 4 << 24 | 1, 8, flags, 0, 0),
        *(folio, 4 << 24 | 1, 16, 0, 3, 64),
        *(0, 5 << 24 | 1, 8, mapping, 0, 0),
    ]
    btf = Btf(_blob(types, strings))

    assert btf.offset(*OFFSETS["page.mapping"]) == 8


@pytest.mark.parametrize("kernel", BLOBS)
def test_structs_of_ksm_have_the_documented_layout(kernel):
    btf = Btf(BLOBS[kernel])
    prefix = "" if kernel == "5.10" else "ksm_"
    item, node = f"{prefix}rmap_item", f"{prefix}stable_node"

    assert [btf.struct_size(item), btf.struct_size(node)] == [64, 64]
    # node, head and hlist lie in unnamed unions and structs.
    assert [
        btf.offset(item, member) for member in ("rmap_list", "mm", "node", "head", "hlist")
    ] == [0, 16, 40, 40, 48]
    assert [
        btf.offset(node, member)
        for member in ("head", "list", "hlist", "kpfn", "rmap_hlist_len", "nid")
    ] == [0, 24, 40, 48, 56, 60]


def test_one_of_two_structs_of_the_same_name_is_chosen_by_a_member():
    btf = Btf(BLOBS["5.10"])

    assert btf.struct_size("mm_slot", having=("rmap_list",)) == 48
    assert btf.struct_size("mm_slot", having=("pte_mapped_thp",)) == 112
    assert btf.offset("mm_slot", "rmap_list") == 32
    with pytest.raises(KernelInterfaceError, match="2 different structs named mm_slot"):
        btf.struct_size("mm_slot")
    with pytest.raises(KernelInterfaceError, match="several structs mm_slot"):
        btf.offset("mm_slot", "mm")


def test_a_struct_is_found_under_whichever_of_its_names_there_is():
    names = ("ksm_rmap_item", "rmap_item")

    assert [Btf(BLOBS[k]).offset(names, "address") for k in ("5.10", "6.1")] == [24, 24]
    assert Btf(BLOBS["5.10"]).offset("ksm_rmap_item", "address") is None


def test_what_is_absent_is_none():
    btf = Btf(BLOBS["6.18h"])

    assert btf.offset("no_such_struct", "address") is None
    assert btf.offset("ksm_rmap_item", "no_such_member") is None
    assert btf.offset("ksm_rmap_item", "address.inner") is None
    assert btf.members("no_such_struct") is None
    assert btf.struct_size("") is None
    assert btf.tracepoint_arguments("no_such_tracepoint") is None
    assert btf.function_ids("cmp_and_merge_page") == ()
    # The tail of a name is not the name.
    assert btf.offset("rmap_item", "address") is None


def test_a_bitfield_has_no_offset():
    btf = Btf(BLOBS["6.18h"])
    members = btf.members("task_struct")
    assert members is not None and members["sched_reset_on_fork"].bitfield_bits == 1

    with pytest.raises(KernelInterfaceError, match="bitfield"):
        btf.offset("task_struct", "sched_reset_on_fork")


@pytest.mark.parametrize("kernel", ["6.12", "6.18h"])
def test_tracepoints_and_their_numbers_of_arguments(kernel):
    btf = Btf(BLOBS[kernel])

    assert {name: btf.tracepoint_arguments(name) for name in btf.tracepoints("ksm_")} == {
        "ksm_start_scan": 2,
        "ksm_stop_scan": 2,
        "ksm_enter": 1,
        "ksm_exit": 1,
        "ksm_merge_one_page": 4,
        "ksm_merge_with_ksm_page": 5,
        "ksm_remove_ksm_page": 1,
        "ksm_remove_rmap_item": 3,
        "ksm_advisor": 3,
    }


def test_kernels_without_ksm_tracepoints_list_none():
    assert [Btf(BLOBS[k]).tracepoints("ksm_") for k in ("5.10", "6.1")] == [(), ()]


# As `bpftool btf dump` prints each FUNC's FUNC_PROTO for the whole vmlinux.
@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("5.10", [2, 3, 1, 1, None, 0, 1, None, 2]),
        ("6.1", [2, 3, 1, None, 1, 0, 1, None, 2]),
        ("6.12", [3, 4, None, None, 1, 0, 1, 2, None]),
        ("6.18h", [3, 4, None, None, 1, 0, 1, 2, None]),
    ],
)
def test_functions_and_their_numbers_of_arguments(kernel, expected):
    btf = Btf(BLOBS[kernel])
    names = (
        *("break_ksm", "unmerge_ksm_pages", "calc_checksum", "__lock_page", "__folio_lock"),
        *("lru_add_drain_all", "remove_rmap_item_from_tree", "ksm_get_folio", "get_ksm_page"),
    )

    assert [btf.function_arguments(name) for name in names] == expected
    assert btf.function_arguments("cmp_and_merge_page") is None
    # The tail of a name is not the name.
    assert btf.function_arguments("folio_lock") is None


@pytest.mark.parametrize(("second", "expected"), [(2, 2), (3, None)])
def test_functions_of_one_name_must_agree_on_their_arguments(second, expected):
    # FUNC 1 of FUNC_PROTO 2 and FUNC 3 of FUNC_PROTO 4.
    types = [1, 12 << 24, 2, 0, 13 << 24 | 2, 0, *([0] * 4)]
    types += [1, 12 << 24, 4, 0, 13 << 24 | second, 0, *([0] * 2 * second)]
    btf = Btf(_blob(types, b"\0twice\0"))

    if expected is None:
        with pytest.raises(KernelInterfaceError, match="several different functions twice"):
            btf.function_arguments("twice")
    else:
        assert btf.function_arguments("twice") == expected


def test_a_function_without_a_prototype_is_not_counted():
    types = [1, 12 << 24, 2, 1, 4 << 24 | 1, 8, 0, 0, 0]

    assert Btf(_blob(types, b"\0odd\0")).function_arguments("odd") is None


def _blob(types: list[int], strings: bytes) -> bytes:
    size = 4 * len(types)
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, size, size, len(strings))
    return header + struct.pack(f"={len(types)}I", *types) + strings


def test_functions_are_listed_with_the_id_that_fentry_needs():
    btf = Btf(BLOBS["6.18h"])
    (type_id,) = btf.function_ids("break_ksm")

    types, strings = _sections(BLOBS["6.18h"])
    name_offset, info, _ = types[type_id]
    assert info >> 24 & 31 == 12
    assert strings[name_offset:].startswith(b"break_ksm\0")


# An independent walk over the types, record by record.
def _sections(blob: bytes) -> tuple[dict[int, tuple[int, int, int]], bytes]:
    _, _, _, length, type_off, type_len, str_off, str_len = struct.unpack_from("=HBBIIIII", blob)
    fixed, entry = {1: 4, 3: 12, 14: 4, 17: 4}, {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
    types, at = {}, 0
    while at < type_len:
        head = struct.unpack_from("=III", blob, length + type_off + at)
        kind, entries = head[1] >> 24 & 31, head[1] & 0xFFFF
        types[len(types) + 1] = head
        at += 12 + fixed.get(kind, 0) + entry.get(kind, 0) * entries
    return types, blob[length + str_off : length + str_off + str_len]


def test_a_kernel_without_btf_lacks_a_feature(tmp_path):
    with pytest.raises(KernelFeatureMissing, match="btf/vmlinux") as raised:
        Btf.read(tmp_path)
    assert "CONFIG_DEBUG_INFO_BTF" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "shorter than a header"),
        (b"\x7fELF" + bytes(40), "magic"),
        (b"\xeb\x9f\x01\x00" + bytes(40), "magic"),
        (BLOBS["6.1"][:2] + b"\x02" + BLOBS["6.1"][3:], "version 2"),
        (BLOBS["6.1"][:-1], "beyond the end"),
    ],
)
def test_what_is_no_btf_is_refused(blob, message):
    with pytest.raises(KernelInterfaceError, match=message):
        Btf(blob)


def test_typedefs_that_go_in_circles_end():
    # TYPEDEF 1 -> 1, and STRUCT 2 with an unnamed member of type 1.
    types = [1, 8 << 24, 1, 1, 4 << 24 | 1, 8, 0, 1, 0]

    with pytest.raises(KernelInterfaceError, match="circles"):
        Btf(_blob(types, b"\0loop\0")).members("loop")


def test_a_struct_inside_itself_ends():
    types = [1, 4 << 24 | 1, 8, 0, 1, 0]

    assert Btf(_blob(types, b"\0loop\0")).members("loop") == {}


def _ask_everything(blob: bytes) -> None:
    btf = Btf(blob)
    for names, path in OFFSETS.values():
        btf.offset(names, path)
    for name in ("mm_slot", "ksm_rmap_item"):
        btf.members(name, having=("mm",))
        btf.struct_size(name, having=("mm",))
    for name in btf.tracepoints("ksm_"):
        btf.tracepoint_arguments(name)
    btf.function_ids("break_ksm")
    for name in FUNCTIONS:
        btf.function_arguments(name)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_bytes_are_refused_or_read_but_never_crash(data):
    blob = bytearray(BLOBS["6.12"])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(blob) - 4))
        word = data.draw(st.sampled_from([0, 1, 2, 0xFFFF, 0xFFFFFFFF]) | st.integers(0, 1 << 15))
        struct.pack_into("=I", blob, at if data.draw(st.booleans()) else at & ~3, word)
    blob = blob[: data.draw(st.just(len(blob)) | st.integers(0, len(blob)))]

    try:
        _ask_everything(bytes(blob))
    except KernelInterfaceError as error:
        assert str(error)
