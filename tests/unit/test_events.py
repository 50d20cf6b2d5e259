import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.capture.hooks import COUNTS
from ksmtrace.events import (
    BODY,
    EVENT_DTYPE,
    FLAG_MEANING,
    HEAD,
    KIND_BY_NAME,
    KINDS,
    NR_KINDS,
    PAYLOAD_BYTES,
    SEARCH_OUTCOME_MEANING,
    SLOT_BYTES,
    EventFlag,
    SearchOutcome,
    c_header,
    concatenate,
    markdown,
    no_events,
    of_kind,
)

ROOT = Path(__file__).parents[2]
WIDTHS = {"u64": 8, "s64": 8, "u32": 4, "s32": 4, "s16": 2, "u16": 2, "u8": 1, "s8": 1, "comm": 16}


def events(count: int) -> np.ndarray:
    made = np.zeros(count, EVENT_DTYPE)
    made["ts_ns"] = np.arange(count)
    made["kind"] = np.arange(count) % (NR_KINDS - 1) + 1
    made["ksm_page"] = np.arange(count) << 40
    return made


def test_the_generated_files_are_current():
    assert (ROOT / "bpf/events.h").read_text() == c_header()
    assert (ROOT / "docs/events.md").read_text() == markdown()


def test_a_slot_is_the_payload_and_the_rings_own_header():
    assert EVENT_DTYPE.itemsize == PAYLOAD_BYTES
    assert SLOT_BYTES == PAYLOAD_BYTES + 8


def test_numbers_and_names_are_unique():
    assert len({kind.number for kind in KINDS}) == len({kind.name for kind in KINDS}) == len(KINDS)
    assert all(0 < kind.number < 256 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_two_fields_of_one_kind_overlap(kind):
    fields = {field.name: field for field in (*HEAD, *BODY)}
    names = {field.name for field in HEAD} | set(kind.body)
    taken: set[int] = set()
    for name in names:
        field = fields[name]
        place = set(range(field.offset, field.offset + WIDTHS[field.c_type]))
        assert not place & taken, name
        assert max(place) < PAYLOAD_BYTES
        taken |= place


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_tracepoint_has_its_program(kind):
    source = (ROOT / "bpf/ksm.c").read_text()
    program = re.search(rf"^ON_TRACEPOINT\({kind.name}\).*?^}}", source, re.S | re.M)
    assert (program is not None) is kind.has_tracepoint
    assert program is None or f"begin({kind.name.upper()})" in program[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_fields_are_declared_once_each(kind):
    declared = {field.name for field in (*HEAD, *BODY)}
    assert set(kind.body) <= declared
    assert len(set(kind.body)) == len(kind.body)


def test_every_field_of_the_body_is_some_kinds():
    assert {field.name for field in BODY} <= {name for kind in KINDS for name in kind.body}


def test_flags_are_single_bits_and_explained():
    assert set(FLAG_MEANING) == set(EventFlag)
    assert all(flag.value & (flag.value - 1) == 0 for flag in EventFlag)
    assert max(EventFlag) < 1 << 8 * EVENT_DTYPE["flags"].itemsize


def test_outcomes_are_explained_and_counted_in_their_order():
    assert set(SEARCH_OUTCOME_MEANING) == set(SearchOutcome)
    counted = [name for name in COUNTS if name.startswith("stable_tree_search.")]
    assert counted == [f"stable_tree_search.{outcome.name.lower()}" for outcome in SearchOutcome]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_c_struct_has_the_layout_that_the_dtype_has(tmp_path):
    source = tmp_path / "layout.c"
    prologue = "".join(
        f"typedef {c} {name};\n"
        for c, name in (
            ("unsigned long long", "u64"),
            ("long long", "s64"),
            ("unsigned", "u32"),
            ("int", "s32"),
            ("short", "s16"),
            ("unsigned short", "u16"),
            ("signed char", "s8"),
            ("unsigned char", "u8"),
        )
    )
    # The header's own static assertions do the comparing.
    source.write_text(prologue + c_header())
    subprocess.run(["cc", "-c", "-o", "/dev/null", str(source)], check=True, cwd=tmp_path)


@pytest.mark.parametrize("counts", [[], [0], [3], [0, 2, 0], [5, 1, 7]])
def test_concatenate_keeps_bytes_and_order(counts):
    batches = [events(count) for count in counts]
    joined = concatenate(batches)
    assert joined.dtype == EVENT_DTYPE
    assert joined.tobytes() == b"".join(batch.tobytes() for batch in batches)


def test_of_kind_keeps_the_order_of_one_and_of_several_kinds():
    count = 6 * (NR_KINDS - 1)
    made = events(count)
    one = of_kind(made, "ksm_enter")
    number = KIND_BY_NAME["ksm_enter"].number
    assert set(one["kind"]) == {number}
    assert list(one["ts_ns"]) == list(range(number - 1, count, NR_KINDS - 1))
    assert len(one) == 6
    two = of_kind(made, "ksm_exit", "ksm_enter")
    assert list(two["ts_ns"]) == sorted([*one["ts_ns"], *of_kind(made, "ksm_exit")["ts_ns"]])
    assert len(of_kind(no_events(), "ksm_exit")) == 0
