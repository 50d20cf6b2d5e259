"""The reconstruction in real guests, beside what the kernel's memory held at the same moments.

Each scenario can be run on each kernel. All of them on one, with twenty minutes of churn:

    export TREE_SCENARIOS="chains writes forks unmerge migrate big swap live offline again numa"
    export TREE_SCENARIOS="$TREE_SCENARIOS forks again churn" CHURN_S=1200
    pytest --timeout 4000 tests/vm/test_tree.py -k "what_the_kernel_holds and 7.x"
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.analysis.recorded import gather
from ksmtrace.claims.claim import Case
from ksmtrace.claims.judgement import as_json, judge_all, nr_faults
from ksmtrace.claims.table import CLAIMS
from ksmtrace.events import KIND_BY_NAME
from ksmtrace.kernel.ksm_check import check_ksm_memory
from ksmtrace.kernel.ksm_memory import ItemState, KsmMemory
from ksmtrace.kernel.witnesses import Cause, compare_witnesses
from ksmtrace.reconstruct.replay import Replay
from ksmtrace.reconstruct.state import TreeState
from ksmtrace.reconstruct.verify import compare_counters, compare_with_memory
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import Batch, Trailer, Witnessed
from ksmtrace.vm import VmOptions, run_in_vm
from ksmtrace.vm.selftests import COMMANDS, NUMA_COMMANDS

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).with_name("guest_tree.py")
ON_ONE_TREE = ("chains", "writes", "forks", "unmerge", "migrate", "again")
# Memory that can go is on the second node.
MEMORY_THAT_GOES = VmOptions(numa_nodes=2, swap_bytes=512 << 20, hotplug_bytes=256 << 20)
GUESTS = {
    "5.10": (*ON_ONE_TREE, "swap"),
    "6.1": ("chains", "swap", "offline", "numa", "forks", "again"),
    "6.12": (*ON_ONE_TREE, "swap", "live", "offline", "numa"),
    "7.x": (*ON_ONE_TREE, "swap", "big", "churn"),
}

# Claims that the kernel's own tests give enough to judge.
HELD = {
    *("6D", "C01.code", "C02.code", "C09", "I13", "Q3.hlist"),
    *("C53", "I14", "I14.order", "C103.kpfn", "C21", "I10", "C03.rest"),
    *("DOC9", "I4", "I6", "I7", "I8", "Q6", "Q8", "DOC13"),
}

# What may differ between memory and mappings while ksmd has not come by again.
BY_RIGHT = {
    *(Cause.EXITED, Cause.UNMERGED, Cause.DROPPED, Cause.WRITTEN),
    *(Cause.NOT_SCANNED, Cause.DETACHED),
}


def scenarios_on(series: str) -> Sequence[str]:
    return os.environ.get("TREE_SCENARIOS", "").split() or GUESTS[series]


@pytest.mark.parametrize("series", GUESTS)
def test_the_reconstruction_is_what_the_kernel_holds(series, kernel_of, tmp_path):
    found = record(kernel_of(series), scenarios_on(series), tmp_path / "tree.ksmt")

    assert [entry["scenario"] for entry, _, _ in found] == ["", *scenarios_on(series), ""]
    by_name = {entry["scenario"]: (entry, reading) for entry, reading, _ in found}
    # The scenarios did something to compare: 13 contents on 31 pages each, 7 to a stable_node.
    shared = [nr_sharers(reading.memory) for _, reading, _ in found]
    assert shared[:2] == [0, 13 * 31]
    # After swap, what nobody has touched since is not shared any more: 106 pages and a child's.
    assert min(shared[2:]) > 100
    chains = by_name["chains"][1].memory.counters
    assert chains["ksm_stable_node_chains"] == 13
    assert chains["ksm_pages_shared"] == 13 * 5
    if "swap" in by_name:
        swap, _ = by_name["swap"]
        assert swap["pswpout"] >= swap["ksm_pages_out"] > 7, swap
        assert swap["ksm_sharers_out"] > 100, swap
        if "ksm_swpin_copy" in swap:
            assert swap["ksm_swpin_copy"] > 0, swap
    if "offline" in by_name:
        offline, _ = by_name["offline"]
        assert offline["blocks_gone"] == offline["blocks_back"] == 2, offline
        assert offline["frames_moved"] > 0
    if "big" in by_name:
        assert nr_sharers(by_name["big"][1].memory) >= 3 * 10_007
    if "live" in by_name:
        entry, reading = by_name["live"]
        assert_shows(entry["tree"], reading.memory)


def test_the_kernels_own_tests_leave_nothing_unexplained(kernel_of, selftests, tmp_path):
    programs = [
        " ".join([str(selftests / program), *arguments])
        # In the order of the kernel's own run_vmtests.sh.
        for program, *arguments in (*COMMANDS[:-1], *NUMA_COMMANDS, COMMANDS[-1])
    ]
    options = VmOptions(numa_nodes=2)
    found = record(kernel_of("6.12"), programs, tmp_path / "tree.ksmt", options)

    ended = {entry["scenario"]: entry for entry, _, _ in found if "status" in entry}
    assert list(ended) == programs
    assert {name: entry for name, entry in ended.items() if entry["status"]} == {}
    # What was compared is not nothing: the first of ksm_functional_tests alone merges 2 MiB.
    appended = KIND_BY_NAME["stable_tree_append"].number
    events = [i.events for i in RecordingReader(tmp_path / "tree.ksmt") if isinstance(i, Batch)]
    assert sum(int((batch["kind"] == appended).sum()) for batch in events) > 512
    assert len(found) > len(programs) + 2, "no reading beside a program"

    # Nor does any claim about KSM raise a false alarm, on the running kernel or afterwards.
    live = [judged for entry in ended.values() for judged in entry["judged"]]
    assert live, "no program was there when the running kernel was judged"
    case = Case(gather(RecordingReader(tmp_path / "tree.ksmt")))
    recorded = as_json(judge_all(CLAIMS, case), case)
    for judged in (*live, recorded):
        assert nr_faults(judged["claims"]) == 0, judged
    verdicts = {claim["id"]: claim["verdict"] for claim in recorded["claims"]}
    assert {claim_id for claim_id in HELD if verdicts[claim_id] != "holds"} == set()


def record(
    kernel, scenarios: Sequence[str], path: Path, options: VmOptions = MEMORY_THAT_GOES
) -> list[tuple[dict, Witnessed, TreeState]]:
    """Record scenarios in a guest, and compare at each reading; each with what belongs to it."""
    result = run_in_vm(
        [sys.executable, str(PROGRAM), str(path), *scenarios],
        kernel,
        replace(options, writable=[path.parent]),
        capture=True,
        timeout_s=1100 + 2 * float(os.environ.get("CHURN_S", "20")),
    )
    said = (result.stderr or b"").decode(errors="replace") + result.console
    assert result.exit_status == 0, f"{result.outcome.value}, {result.exit_status}:\n{said}"
    items = list(RecordingReader(path))
    assert isinstance(items[-1], Trailer)
    assert items[-1].command_exit_status == 0, said

    told = json.loads(path.with_suffix(".json").read_text())
    entries = [entry for entry in told for _ in range(entry.get("readings", 0) + 1)]
    readings = [item for item in items if isinstance(item, Witnessed)]
    assert [r.moment for r in readings] == ["first", *["asked"] * len(entries), "last"]
    replay = Replay(lambda: RecordingReader(path))
    found = []
    for entry, reading in zip(
        [{"scenario": ""}, *entries, {"scenario": ""}], readings, strict=True
    ):
        state = replay.state_at(reading.begin_ns)
        assert_equal(state, reading, entry["scenario"])
        found.append((entry, reading, state))
    return found


def assert_equal(state: TreeState, reading: Witnessed, scenario: str) -> None:
    assert reading.memory is not None, reading.why_not
    assert reading.pages is not None, reading.why_not
    assert reading.memory.consistent
    assert check_ksm_memory(reading.memory) == []
    assert state.incomplete == ()
    comparison = compare_with_memory(state, reading.memory)
    assert comparison.differences.tolist() == [], scenario
    for name, (ours, theirs) in compare_counters(state, reading.memory).items():
        if ours is not None:
            assert ours == theirs, (scenario, name)
    causes = compare_witnesses(reading.memory, reading.pages)["cause"]
    assert set(causes.tolist()) <= BY_RIGHT, scenario


def assert_shows(tree: dict, memory: KsmMemory) -> None:
    """What `ksmtrace tree` showed of the running kernel is what its memory held right after."""
    assert (tree["world"], tree["complete"]) == ("memory", True)
    pids = dict(
        zip(memory.mm_slots["mm_slot"].tolist(), memory.mm_slots["pid"].tolist(), strict=True)
    )
    places: dict[int, list] = {}
    for item in memory.rmap_items[memory.rmap_items["state"] == ItemState.STABLE]:
        place = (pids[int(item["mm_slot"])], f"{item['address']:#x}")
        places.setdefault(int(item["stable_node"]), []).append(place)
    expected = {
        int(node["kpfn"]): (f"{node['chain']:#x}" if node["chain"] else None, sorted(sharers))
        for node in memory.stable_nodes
        if (sharers := places.get(int(node["stable_node"])))
    }
    shown = {
        node["kpfn"]: (node["chain"], sorted((s["pid"], s["address"]) for s in node["sharers"]))
        for node in tree["stable_nodes"]
        if node["sharers"]
    }
    assert shown == expected
    assert {node["nid"] for node in tree["stable_nodes"]} <= {0, 1}
    assert all(s["comm"] for node in tree["stable_nodes"] for s in node["sharers"])


def nr_sharers(memory: KsmMemory) -> int:
    return int(np.count_nonzero(memory.rmap_items["state"] == ItemState.STABLE))
