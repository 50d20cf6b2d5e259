"""Readings of the witnesses in a recording: real kernel memory, written and read back."""

import dataclasses
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.kernel.ksm_memory import RMAP_ITEM_DTYPE, read_ksm_memory
from ksmtrace.kernel.page_truth import PAGE_DTYPE, RANGE_DTYPE, PageTruth
from ksmtrace.kernel.probes import KpfProbe
from ksmtrace.recording import witness
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.recording.writer import RecordingWriter
from ksmtrace.stream import Header, Trailer, Witnessed

GOLDEN = Path(__file__).parents[1] / "golden/kcore"
HEADER = Header("0", ["ksmtrace"], 1, 2, {"kernel": {}}, [], [], {})
TRAILER = Trailer(8, {}, "interrupted")
ARRAYS = ("stable_nodes", "sharers", "rmap_items", "unstable_nodes", "mm_slots")


@pytest.fixture(scope="module", params=("5.10", "7.x"))
def memory(request, tmp_path_factory):
    tree = tmp_path_factory.mktemp("kernel") / request.param
    shutil.copytree(GOLDEN / request.param, tree)
    (tree / "proc/kcore").write_bytes(lzma.decompress((tree / "proc/kcore.xz").read_bytes()))
    return read_ksm_memory(tree)


def make_pages(count: int) -> PageTruth:
    pages = np.zeros(count, PAGE_DTYPE)
    pages["pid"], pages["pfn"] = 5, np.arange(count) * 3
    pages["is_ksm"] = np.arange(count) % 3 - 1
    ranges = np.array([(5, 4096, 4096 * (count + 1))], RANGE_DTYPE)
    return PageTruth(ranges, pages, KpfProbe(False, "it lies"), 2, 1, 7, 0)


def there_and_back(path: Path, *items):
    with RecordingWriter(path, HEADER) as writer:
        for item in (*items, TRAILER):
            writer.write(item)
    reader = RecordingReader(path)
    found = list(reader)
    assert reader.cut_off is None
    assert found.pop() == TRAILER
    return found


def test_both_witnesses_come_back_as_they_were(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(witness, "_ROWS", 13)  # so that arrays are cut, and not at their end
    pages = make_pages(101)
    whole = Witnessed("last", 3, 4, memory, pages, {})
    nothing = Witnessed("first", 1, 2, None, None, {"memory": "no kcore", "pages": "not root"})

    first, last = there_and_back(tmp_path / "x.ksmt", nothing, whole)

    assert (first.moment, first.memory, first.pages) == ("first", None, None)
    assert first.why_not == nothing.why_not
    assert (last.moment, last.begin_ns, last.end_ns, last.why_not) == ("last", 3, 4, {})
    for name in ARRAYS:
        ours, theirs = getattr(memory, name), getattr(last.memory, name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs), name
    for field in dataclasses.fields(memory):
        if field.name not in ARRAYS:
            assert getattr(last.memory, field.name) == getattr(memory, field.name), field.name
    assert last.memory.consistent
    assert np.array_equal(last.pages.pages, pages.pages)
    assert np.array_equal(last.pages.ranges, pages.ranges)
    assert last.pages.kpf_ksm == pages.kpf_ksm
    assert (last.pages.nr_vanished, last.pages.nr_swapped) == (1, 7)


def test_a_reading_that_was_cut_off_is_left_out(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(witness, "_ROWS", 13)
    path = tmp_path / "x.ksmt"
    with RecordingWriter(path, HEADER) as writer:
        writer.write(Witnessed("first", 1, 2, memory, None, {}))
        middle = writer.written_bytes - 200
    path.write_bytes(path.read_bytes()[:middle])
    reader = RecordingReader(path)

    assert list(reader) == []
    assert reader.cut_off is not None


def test_fields_of_another_version_are_taken_by_name(memory):
    notes = [
        json.loads(json.dumps(n))
        for n in witness.iter_notes(Witnessed("first", 1, 2, memory, None, {}))
    ]
    rows = np.zeros(len(memory.rmap_items), [("new", "<u4"), ("rmap_item", "<u8")])
    rows["rmap_item"] = memory.rmap_items["rmap_item"]
    gathering = witness.Gathering(notes[0])
    for note in notes[1:]:
        if note["array"] == "memory.rmap_items":
            note["dtype"] = [["new", "<u4"], ["rmap_item", "<u8"]]
            note["rows"] = witness.base64.b64encode(rows.tobytes()).decode()
        gathering.add(note)
    whole = gathering.whole()

    assert whole is not None
    assert whole.memory is not None
    assert whole.memory.rmap_items.dtype == RMAP_ITEM_DTYPE
    assert np.array_equal(whole.memory.rmap_items["rmap_item"], memory.rmap_items["rmap_item"])
    assert not whole.memory.rmap_items["mm"].any()


@pytest.mark.parametrize(
    "change",
    [
        {"array": "memory.nothing"},
        {"dtype": [["a", "|O"]]},
        {"dtype": [["a", "<u8"], ["a", "<u8"]]},
        {"rows": "?"},
        {"rows": ""},
    ],
)
def test_rows_that_nobody_wrote_are_damage(tmp_path, memory, monkeypatch, change):
    real = witness.iter_notes
    monkeypatch.setattr(
        witness,
        "iter_notes",
        lambda item: (n | change if n["type"] == witness.ROWS_NOTE else n for n in real(item)),
    )
    path = tmp_path / "x.ksmt"
    with RecordingWriter(path, HEADER) as writer:
        writer.write(Witnessed("first", 1, 2, memory, None, {}))

    reader = RecordingReader(path)
    assert list(reader) == []
    assert "damaged" in reader.cut_off
