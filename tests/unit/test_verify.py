"""The reconstruction beside kernel memory: equal for a real guest, and different where one lies."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ksmtrace.cli import ksmtrace, verify
from ksmtrace.kernel.ksm_memory import ItemState, NodeKind
from ksmtrace.kernel.witnesses import compare_witnesses
from ksmtrace.reconstruct.replay import Replay
from ksmtrace.reconstruct.verify import (
    Cause,
    What,
    as_memory,
    compare_counters,
    compare_with_memory,
)
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import Witnessed

GOLDENS = Path(__file__).parents[1] / "golden/recordings"
# tests/vm/guest_tree.py with scenarios chains and unmerge, on Debian 6.12.117.
FILE = GOLDENS / "guest-6.12-witnessed.ksmt"


@pytest.fixture(scope="module")
def readings():
    return [item for item in RecordingReader(FILE) if isinstance(item, Witnessed)]


@pytest.fixture(scope="module")
def state(readings):
    return Replay(lambda: RecordingReader(FILE)).state_at(readings[1].begin_ns)


@pytest.fixture(scope="module")
def memory(readings):
    """After scenario chains: 13 contents on 31 pages each, 7 to a stable_node; 53 unique pages."""
    return readings[1].memory


def changed(memory, array, change):
    rows = getattr(memory, array).copy()
    result = change(rows)
    return replace(memory, **{array: rows if result is None else result})


def found(state, memory):
    comparison = compare_with_memory(state, memory)
    rows = comparison.differences
    return [(What(row["what"]), Cause(row["cause"])) for row in rows]


def test_a_real_guest_has_no_difference(readings):
    replay = Replay(lambda: RecordingReader(FILE))

    assert [r.moment for r in readings] == ["first", "asked", "asked", "last"]
    for reading in readings:
        comparison = compare_with_memory(replay.state_at(reading.begin_ns), reading.memory)
        assert len(comparison.differences) == 0
        assert len(comparison.contradictions) == 0


def test_what_was_compared_follows_from_the_workload(state, memory):
    compared = compare_with_memory(state, memory).compared

    assert list(compared.items()) == [
        *(("stable_nodes", 65), ("sharers", 403), ("chains", 13), ("unstable_rmap_items", 53)),
    ]
    counters = compare_counters(state, memory)
    assert counters["ksm_pages_shared"] == (65, 65)
    assert counters["ksm_pages_sharing"] == (338, 338)
    assert counters["ksm_pages_unshared"] == (53, 53)
    assert counters["ksm_stable_node_chains"] == (13, 13)
    assert counters["ksm_stable_node_dups"] == (65, 65)


def first_dup(rows):
    return np.flatnonzero(rows["kind"] == NodeKind.DUP)[0]


def test_a_node_that_only_the_kernel_has(state, memory):
    def add(rows):
        extra = rows[[first_dup(rows)]]
        extra["stable_node"] += 8
        return np.append(rows, extra)

    lied = changed(memory, "stable_nodes", add)
    assert found(state, lied) == [(What.NODE_MISSING, Cause.CONTRADICTION)]


def test_a_node_that_only_the_reconstruction_has(state, memory):
    def drop(rows):
        return np.delete(rows, first_dup(rows))

    differences = found(state, changed(memory, "stable_nodes", drop))
    assert (What.NODE_TOO_MANY, Cause.CONTRADICTION) in differences


def test_another_frame(state, memory):
    def move(rows):
        rows["kpfn"][first_dup(rows)] += 1

    lied = changed(memory, "stable_nodes", move)
    assert found(state, lied) == [(What.KPFN, Cause.CONTRADICTION)]


def test_another_chain(state, memory):
    def rehang(rows):
        rows["chain"][first_dup(rows)] += 64

    lied = changed(memory, "stable_nodes", rehang)
    assert found(state, lied) == [(What.CHAIN, Cause.CONTRADICTION)]


def test_a_chain_that_only_one_side_has(state, memory):
    def rename(rows):
        rows["stable_node"][np.flatnonzero(rows["kind"] == NodeKind.CHAIN)[0]] += 64

    assert found(state, changed(memory, "stable_nodes", rename)) == [
        (What.CHAIN_MISSING, Cause.CONTRADICTION),
        (What.CHAIN_TOO_MANY, Cause.CONTRADICTION),
    ]


@pytest.mark.parametrize(("in_kernel", "counted"), [(True, 14), (False, 13)])
def test_a_chain_without_dups_may_have_been_freed_since(state, memory, in_kernel, counted):
    lonely = state.chains[:1].copy()
    lonely["chain"] += 64
    lonely["dups"] = 0
    ours = replace(
        state,
        chains=np.append(state.chains, lonely),
        totals=replace(state.totals, empty_chains=1),
    )

    def add(rows):
        extra = rows[rows["kind"] == NodeKind.CHAIN][:1]
        extra["stable_node"] = lonely["chain"]
        return np.append(rows, extra)

    held = changed(memory, "stable_nodes", add) if in_kernel else memory
    held = replace(held, counters={**memory.counters, "ksm_stable_node_chains": counted})
    expected = [] if in_kernel else [(What.CHAIN_TOO_MANY, Cause.EMPTY)]
    assert found(ours, held) == expected
    assert compare_counters(ours, held)["ksm_stable_node_chains"] == (counted, counted)
    # Neither fewer than have dups, nor more than that and the empty ones.
    for wrong, nearest in ((12, 13), (15, 14)):
        lied = replace(memory, counters={"ksm_stable_node_chains": wrong})
        assert compare_counters(ours, lied) == {"ksm_stable_node_chains": (nearest, wrong)}


@pytest.mark.parametrize(
    ("was", "becomes", "expected"),
    [
        (ItemState.STABLE, ItemState.NONE, What.SHARER_TOO_MANY),
        (ItemState.UNSTABLE, ItemState.NONE, What.UNSTABLE_TOO_MANY),
    ],
)
def test_an_rmap_item_that_the_kernel_has_in_no_tree(state, memory, was, becomes, expected):
    def change(rows):
        rows["state"][np.flatnonzero(rows["state"] == was)[0]] = becomes

    lied = changed(memory, "rmap_items", change)
    assert found(state, lied) == [(expected, Cause.CONTRADICTION)]


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (ItemState.STABLE, What.SHARER_MISSING),
        (ItemState.UNSTABLE, What.UNSTABLE_MISSING),
    ],
)
def test_an_rmap_item_that_the_reconstruction_does_not_have(state, memory, of, expected):
    def add(rows):
        extra = rows[np.flatnonzero(rows["state"] == of)[:1]]
        extra["rmap_item"] += 8
        return np.append(rows, extra)

    lied = changed(memory, "rmap_items", add)
    assert found(state, lied) == [(expected, Cause.CONTRADICTION)]


@pytest.mark.parametrize("field", ["address", "mm"])
def test_a_sharer_that_is_somewhere_else(state, memory, field):
    def change(rows):
        rows[field][np.flatnonzero(rows["state"] == ItemState.STABLE)[0]] += 4096

    lied = changed(memory, "rmap_items", change)
    assert found(state, lied) == [(What.SHARER_ELSEWHERE, Cause.CONTRADICTION)]


def test_losses_and_what_was_before_explain(state, memory):
    def drop(rows):
        rows["state"][np.flatnonzero(rows["state"] == ItemState.STABLE)[0]] = ItemState.NONE

    class Lossy:
        lost, since_ns, why, kind = 3, 0, "lost", "stable_tree_append"

    lied = changed(memory, "rmap_items", drop)
    lossy = replace(state, incomplete=(Lossy(),))
    assert found(lossy, lied) == [(What.SHARER_TOO_MANY, Cause.LOST)]
    fewer = replace(
        state,
        known_from_memory=False,
        rmap_items=state.rmap_items[state.rmap_items["state"] != ItemState.UNSTABLE],
    )
    assert set(found(fewer, memory)) == {(What.UNSTABLE_MISSING, Cause.BEFORE)}


def test_the_reconstruction_beside_what_is_mapped(state, readings):
    pages = readings[1].pages
    memory = as_memory(state)

    assert (memory.rmap_items["state"] == ItemState.STABLE).sum() == 403
    assert len(compare_witnesses(memory, pages)) == 0
    merged = np.flatnonzero(np.isin(pages.pages["pfn"], state.stable_nodes["kpfn"]))
    one_less = replace(pages, pages=np.delete(pages.pages, merged[0]))
    assert len(compare_witnesses(memory, one_less)) == 1


def test_verify_says_no_difference_and_exits_with_0():
    run = CliRunner().invoke(ksmtrace, ["tree", "--verify", str(FILE)])

    assert run.exit_code == 0, run.output
    compared = "65 stable_nodes, 403 sharers, 13 chains, 53 unstable_rmap_items"
    assert f"no difference in {compared}" in run.output
    assert "CONTRADICTION" not in run.output
    plain = CliRunner().invoke(ksmtrace, ["tree", "--verify", "--json", str(FILE)])
    entries = json.loads(plain.stdout)["verify"]
    assert [entry["moment"] for entry in entries] == ["first", "asked", "asked", "last"]
    assert all(entry["consistent"] for entry in entries)
    assert entries[1]["reconstruction_and_memory"]["contradictions"] == 0


def test_verify_says_a_contradiction_and_exits_with_1(monkeypatch):
    from ksmtrace.kernel import ksm_check

    monkeypatch.setattr(ksm_check, "check_ksm_memory", lambda memory: ["a lie", "another"])
    run = CliRunner().invoke(ksmtrace, ["tree", "--verify", str(FILE)])

    assert run.exit_code == 1
    assert "2 CONTRADICTIONS" in run.output
    assert "a lie" in run.output


def test_a_recording_without_readings_says_how_to_make_one():
    run = CliRunner().invoke(ksmtrace, ["tree", "--verify", str(GOLDENS / "cow.ksmt")])

    assert run.exit_code != 0
    assert "--witnesses" in str(getattr(run.exception, "hint", ""))


def test_an_event_during_a_reading_disturbs_it(readings):
    assert verify.find_undisturbed(RecordingReader(FILE), readings) == [True] * 4
    longer = replace(readings[1], end_ns=readings[2].begin_ns)
    assert verify.find_undisturbed(RecordingReader(FILE), [longer, readings[2]]) == [False, True]


def test_a_disturbed_reading_is_no_contradiction():
    entry = {"consistent": False, "memory_itself": {"contradictions": 3}}

    assert verify.nr_contradictions([entry]) == 0
    assert verify.nr_contradictions([entry | {"consistent": True}]) == 3
