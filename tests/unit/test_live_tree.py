"""The tree without a recording, made from readings that a real guest's recording holds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ksmtrace.cli import ksmtrace
from ksmtrace.errors import PrivilegeMissing, UsageError
from ksmtrace.kernel.ksm_memory import ItemState
from ksmtrace.reconstruct import live
from ksmtrace.reconstruct.content import make_content
from ksmtrace.reconstruct.verify import compare_counters, compare_with_memory
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import Witnessed

FILE = Path(__file__).parents[1] / "golden/recordings/guest-6.12-witnessed.ksmt"


@pytest.fixture(scope="module")
def header():
    return RecordingReader(FILE).header


@pytest.fixture(scope="module")
def reading():
    """After 13 contents on 31 pages each, 7 to a stable_node, and 53 unique pages."""
    return [item for item in RecordingReader(FILE) if isinstance(item, Witnessed)][1]


@pytest.fixture
def root(tmp_path):
    """A kernel whose KSM counts the same, and where no process of the guest's is left."""
    ksm = tmp_path / "sys/kernel/mm/ksm"
    ksm.mkdir(parents=True)
    for name, value in {"run": 0, "pages_shared": 65, "pages_sharing": 338}.items():
        (ksm / name).write_text(f"{value}\n")
    return tmp_path


def places(content):
    return {
        node["kpfn"]: sorted((s["pid"], s["address"]) for s in node["sharers"])
        for node in content["stable_nodes"]
    }


def test_the_memory_is_told_as_it_was_read(header, reading, root):
    memory = reading.memory
    state = live.state_of_memory(header, memory, reading.begin_ns, root)

    assert len(compare_with_memory(state, memory).differences) == 0
    counters = compare_counters(state, memory)
    assert counters == {name: (value, value) for name, (_, value) in counters.items()}
    assert counters["ksm_stable_node_chains"] == (13, 13)
    content = make_content(header, state)
    assert (content["world"], content["complete"]) == ("memory", True)
    assert content["counters"]["pages_sharing"] == 338
    assert content["totals"]["pages_unshared"] == len(content["unstable_rmap_items"]) == 53
    assert [(chain["nid"], chain["dups"]) for chain in content["chains"]] == 13 * [(0, 5)]
    assert all(node["chain"] and node["moved"] is None for node in content["stable_nodes"])
    # No process of that pid and name is here, so the name is the memory's.
    (process,) = content["processes"]
    assert process["comm"] == reading.memory.mm_slots["comm"][0].decode()
    assert process["zero_pages_placed"] is None


def test_what_is_mapped_names_the_same_frames_and_places(header, reading, root):
    memory = live.state_of_memory(header, reading.memory, reading.begin_ns, root)
    mapped = live.state_of_pages(header, reading.pages, "for a reason", root)
    content = make_content(header, mapped)

    assert places(content) == places(make_content(header, memory))
    assert (content["world"], content["complete"]) == ("mapped", False)
    assert content["chains"] is content["unstable_rmap_items"] is None
    assert {node["chain"] for node in content["stable_nodes"]} == {None}
    assert content["totals"] | {"empty_chains": None} == dict.fromkeys(content["totals"]) | {
        "pages_shared": 65,
        "pages_sharing": 338,
        "unseen_sharers_nodes": 0,
    }
    assert content["processes"][0]["unstable"] is None
    assert any("for a reason" in text for text in content["not_visible"])


def test_a_frame_that_others_map_too_has_at_least_these_sharers(header, reading, root):
    pages = reading.pages.pages.copy()
    shared = int(reading.pages.merged_frames()["pfn"][0])
    pages["mapcount"][pages["pfn"] == shared] += 1
    mapped = live.state_of_pages(header, replace(reading.pages, pages=pages), "", root)
    nodes = mapped.stable_nodes
    assert nodes["kpfn"][nodes["unseen_sharers"]].tolist() == [shared]


def test_a_reading_that_ksmd_disturbed_says_so(header, reading, root):
    items = reading.memory.rmap_items.copy()
    lost = int((items["state"][:7] == ItemState.STABLE).sum())
    items["mm"][:7] = 0xFFFF_8880_DEAD_0000
    disturbed = replace(
        reading.memory,
        rmap_items=np.concatenate([items, items[-3:]]),
        stable_nodes=np.concatenate([reading.memory.stable_nodes, reading.memory.stable_nodes[:2]]),
        changed=("ksm_scan.address",),
        attempts=23,
    )
    state = live.state_of_memory(header, disturbed, reading.begin_ns, root)
    assert [reason.why for reason in state.incomplete] == [
        "ksmd was at work during each of 23 readings of the kernel's memory"
    ]
    assert not make_content(header, state)["complete"]
    assert len(state.sharers()) == 403 - lost


def test_without_any_right_the_error_names_both_ways(header, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise PrivilegeMissing("refused", "run as root")

    monkeypatch.setattr(live, "read_page_truth", refuse)
    with pytest.raises(PrivilegeMissing, match=r"refused; and .*kallsyms") as raised:
        live.read_live_tree(lambda text: None, tmp_path)
    assert raised.value.hint.startswith("run as root")


@pytest.mark.parametrize("option", [("--at", "3"), ("--pfn", "17"), ("--address", "7:1000")])
def test_what_was_takes_a_recording(option):
    result = CliRunner().invoke(ksmtrace, ["tree", *option])
    assert isinstance(result.exception, UsageError)
    assert "takes a recording" in str(result.exception)
