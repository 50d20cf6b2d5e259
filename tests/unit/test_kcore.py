import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError, PrivilegeMissing
from ksmtrace.kernel.kcore import Kcore, Segment, parse_segments
from ksmtrace.kernel.memory import UnmappedAddress

PAGE = 4096
DIRECT, TEXT = 0xFFFF_8880_0000_1000, 0xFFFF_FFFF_8100_0000


def core_file(segments, kind=4, machine_class=2):
    ident = b"\x7fELF" + bytes([machine_class, 1, 1]) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, kind, 62, 1, 0, 64, 0, 0, 64, 56, len(segments) + 1, 0, 0, 0
    )
    # A note comes first, as in /proc/kcore.
    table = struct.pack("<IIQQQQQQ", 4, 0, 0, 0, 0, 0, 0, 0)
    offset = 64 + 56 * (len(segments) + 1)
    for address, content in segments:
        table += struct.pack(
            "<IIQQQQQQ", 1, 7, offset, address, 0, len(content), len(content), PAGE
        )
        offset += len(content)
    return header + table + b"".join(content for _, content in segments)


def words(*values):
    return struct.pack(f"<{len(values)}Q", *values)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc").mkdir()
    text = words(*range(1024))
    # Three pages in two adjacent ranges, and one that begins and ends within its page.
    direct = words(*range(10_000, 11_024))
    (tmp_path / "proc/kcore").write_bytes(
        core_file(
            [
                (TEXT, text),
                (DIRECT, direct),
                (DIRECT + 2 * PAGE, words(7) * 512),
                (0x10_0100, words(1, 2, 3)),
            ]
        )
    )
    return tmp_path


def test_words_of_every_range(root):
    with Kcore.open(root) as kcore:
        assert [segment.start for segment in kcore.segments] == [
            0x10_0100,
            DIRECT,
            DIRECT + 2 * PAGE,
            TEXT,
        ]
        assert kcore.word(TEXT + 8 * 1023) == 1023
        assert kcore.word(DIRECT) == 10_000
        assert kcore.word(DIRECT + 2 * PAGE) == 7
        assert kcore.word(0x10_0110) == 3


def test_integers_and_bytes_of_any_alignment(root):
    with Kcore.open(root) as kcore:
        assert kcore.integer(TEXT + 8 * 300, 4) == 300
        assert kcore.integer(TEXT + 8 * 300 + 1, 1) == 1
        assert kcore.content(TEXT + PAGE - 3, 12) == words(511, 512, 513)[5:17]
        assert kcore.integer(DIRECT + 1, 4, signed=True) == 10_000 >> 8


def test_many_structures_at_once_across_pages_and_ranges(root):
    addresses = np.array([DIRECT + 2 * PAGE - 8, TEXT + 16, TEXT + PAGE - 8, TEXT + 16], np.uint64)
    with Kcore.open(root) as kcore:
        assert kcore.words(addresses, 2).tolist() == [[11_023, 7], [2, 3], [511, 512], [2, 3]]
        assert kcore.words(addresses[:0], 8).shape == (0, 8)
        assert kcore.nr_pages == 4


def test_a_page_is_read_once_until_it_is_forgotten(root):
    with Kcore.open(root) as kcore:
        before = kcore.word(TEXT)
        content = (root / "proc/kcore").read_bytes()
        place = content.index(words(0, 1, 2))
        with (root / "proc/kcore").open("r+b") as file:
            file.seek(place)
            file.write(words(77))
        assert kcore.word(TEXT) == before == 0
        kcore.forget()
        assert kcore.word(TEXT) == 77


def test_memory_that_is_added_or_taken_out_changes_the_ranges(root):
    added = DIRECT + 64 * PAGE
    with Kcore.open(root) as kcore:
        with pytest.raises(UnmappedAddress):
            kcore.word(added)
        (root / "proc/kcore").write_bytes(core_file([(added, words(*range(512)))]))
        kcore.forget()
        assert kcore.word(added + 8) == 1
        with pytest.raises(UnmappedAddress):
            kcore.word(DIRECT)


@pytest.mark.parametrize(
    "address",
    [
        *(0, 0x100, 0x10_1000, DIRECT - 8, DIRECT + 3 * PAGE, TEXT + 2 * PAGE),
        *(TEXT + 4, 0xDEAD_0000_0000_0100, 2**64 - 8),
    ],
)
def test_an_address_that_is_none(root, address):
    with Kcore.open(root) as kcore:
        with pytest.raises(UnmappedAddress):
            kcore.word(address)
        with pytest.raises(UnmappedAddress):
            kcore.words(np.array([TEXT, address], np.uint64), 1)


def test_no_such_file(tmp_path):
    with pytest.raises(KernelFeatureMissing) as raised:
        Kcore.open(tmp_path)
    assert "CONFIG_PROC_KCORE=y" in raised.value.hint


def test_a_locked_down_kernel(root, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PrivilegeMissing, match="EPERM") as raised:
        Kcore.open(root)
    assert "lockdown" in raised.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF",
        bytes(64),
        core_file([], kind=2),
        core_file([], machine_class=1),
        core_file([(TEXT, bytes(PAGE))])[:100],
    ],
)
def test_a_file_that_is_no_core(root, content):
    (root / "proc/kcore").write_bytes(content)
    with pytest.raises(KernelInterfaceError):
        Kcore.open(root)


def test_a_core_that_is_cut_off(root):
    content = (root / "proc/kcore").read_bytes()
    (root / "proc/kcore").write_bytes(content[:-PAGE])
    with Kcore.open(root) as kcore, pytest.raises(KernelInterfaceError, match="ends before"):
        kcore.word(DIRECT + 2 * PAGE + 512)


@given(st.binary(max_size=128), st.binary(max_size=300))
def test_any_bytes_give_segments_or_an_error(header, table):
    for start in (header, core_file([])[: 64 - len(header)] + header):
        try:
            segments = parse_segments(start, table, "kcore")
        except KernelInterfaceError:
            continue
        assert all(isinstance(segment, Segment) for segment in segments)
