"""The reconstruction in real guests, beside what the kernel's memory held at the same moments."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.kernel.ksm_check import check_ksm_memory
from ksmtrace.kernel.ksm_memory import ItemState
from ksmtrace.kernel.witnesses import Cause, compare_witnesses
from ksmtrace.reconstruct.replay import Replay
from ksmtrace.reconstruct.verify import compare_counters, compare_with_memory
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import Trailer, Witnessed
from ksmtrace.vm import VmOptions, run_in_vm

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).with_name("guest_tree.py")
ON_ONE_TREE = ("chains", "writes", "forks", "unmerge", "migrate", "again")
ON_TWO_TREES = ("chains", "numa", "forks", "again")

# What may differ between memory and mappings while ksmd has not come by again.
BY_RIGHT = {Cause.EXITED, Cause.UNMERGED, Cause.WRITTEN, Cause.NOT_SCANNED, Cause.DETACHED}


@pytest.mark.parametrize(
    ("series", "scenarios"),
    [
        ("5.10", ON_ONE_TREE),
        ("6.1", ON_TWO_TREES),
        ("6.12", ON_ONE_TREE),
        ("7.x", ON_ONE_TREE),
    ],
)
def test_the_reconstruction_is_what_the_kernel_holds(series, scenarios, kernel_of, tmp_path):
    path = tmp_path / "tree.ksmt"
    result = run_in_vm(
        [sys.executable, str(PROGRAM), str(path), *scenarios],
        kernel_of(series),
        VmOptions(writable=[tmp_path], numa_nodes=2),
        capture=True,
        timeout_s=900,
    )
    assert result.exit_status == 0, result.stderr

    items = list(RecordingReader(path))
    assert isinstance(items[-1], Trailer)
    assert items[-1].command_exit_status == 0, result.stderr
    readings = [item for item in items if isinstance(item, Witnessed)]
    assert [r.moment for r in readings] == ["first", *["asked"] * len(scenarios), "last"]
    replay = Replay(lambda: RecordingReader(path))
    shared = []
    for reading in readings:
        assert reading.memory is not None, reading.why_not
        assert reading.pages is not None, reading.why_not
        assert reading.memory.consistent
        assert check_ksm_memory(reading.memory) == []
        state = replay.state_at(reading.begin_ns)
        assert state.incomplete == ()
        comparison = compare_with_memory(state, reading.memory)
        assert comparison.differences.tolist() == [], (reading.moment, len(shared))
        for name, (ours, theirs) in compare_counters(state, reading.memory).items():
            if ours is not None:
                assert ours == theirs, name
        causes = compare_witnesses(reading.memory, reading.pages)["cause"]
        assert set(causes.tolist()) <= BY_RIGHT
        stable = reading.memory.rmap_items["state"] == ItemState.STABLE
        shared.append(int(np.count_nonzero(stable)))
    # The scenarios did something to compare: 13 contents on 31 pages each, 7 to a stable_node.
    assert shared[:2] == [0, 13 * 31]
    assert min(shared[2:]) > 300
    first = readings[1].memory
    assert first is not None
    assert first.counters["ksm_stable_node_chains"] == 13
    assert first.counters["ksm_pages_shared"] == 13 * 5
