"""Reconstructions of real kernels' recordings, beside the counters that those kernels kept."""

import json
import lzma
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.events import EVENT_DTYPE, KIND_BY_NAME, EventFlag
from ksmtrace.kernel.ksm_memory import read_ksm_memory
from ksmtrace.reconstruct.columns import Groups, Table, stable_order
from ksmtrace.reconstruct.content import find_processes, find_sharing, make_content
from ksmtrace.reconstruct.fold import Fold, nid_of
from ksmtrace.reconstruct.history import frame_history, page_history
from ksmtrace.reconstruct.replay import Replay, iter_states, told_ns
from ksmtrace.reconstruct.snapshot import take_snapshot
from ksmtrace.reconstruct.state import ItemState, World
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import Batch, CounterSample, Header, Losses, Witnessed

GOLDENS = Path(__file__).parents[1] / "golden" / "recordings"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.ksmt"))
GUESTS = [name for name in NAMES if name.startswith("guest-")]
KSMTRACE = [sys.executable, "-c", "from ksmtrace.cli import main; main()"]
KIND = {name: kind.number for name, kind in KIND_BY_NAME.items()}


def read(name: str) -> RecordingReader:
    return RecordingReader(GOLDENS / f"{name}.ksmt")


def batches(name: str):
    return (item.events for item in read(name) if isinstance(item, Batch))


def state_of(name: str, at_ns: int | None = None):
    return Replay(lambda: read(name)).state_at(at_ns)


def is_quiet(sample: CounterSample, events: np.ndarray) -> bool:
    """Say whether nothing that moves the counters happened around the sample."""
    near = events["ts_ns"][events["kind"] != KIND["ksm_enter"]].astype(np.int64)
    return not ((near > sample.begin_ns - 5_000_000) & (near < sample.end_ns + 5_000_000)).any()


@pytest.mark.parametrize("name", GUESTS)
def test_by_functions_the_totals_are_the_kernels_own_counters(name):
    events = np.concatenate([batch["ts_ns"] for batch in batches(name)])
    everything = [batch for batch in batches(name)]
    quiet = 0
    for sample, state in iter_states(read(name)):
        assert state.world == World.FUNCTIONS
        if not all(is_quiet(sample, batch) for batch in everything):
            continue
        if state.older is not None and state.scan.complete < 2:
            continue  # not every page has been looked at yet
        quiet += 1
        totals = state.totals
        for counter in ("pages_shared", "pages_sharing", "stable_node_chains", "stable_node_dups"):
            known = getattr(totals, counter)
            assert known is None or known == sample.ksm[counter]
        if totals.pages_unshared is not None and state.scan.running is False:
            # The page that ksmd looked at last is told of when it goes on.
            assert sample.ksm["pages_unshared"] - totals.pages_unshared in (0, 1)
    assert quiet >= 2
    assert len(events)


@pytest.mark.parametrize("name", [name for name in GUESTS if name != "guest-6.1-midlife"])
def test_the_totals_are_the_sums_of_what_each_event_says_of_the_counters(name):
    """By the events' own flags and counts, of which the reconstruction needs none."""
    shared = sharing = 0
    for events in batches(name):
        kinds, flags = events["kind"], events["flags"]
        joins = kinds == KIND["stable_tree_append"]
        first = joins & ((flags & EventFlag.FIRST_SHARER) != 0)
        leaves = kinds == KIND["remove_rmap_item_from_tree"]
        leaves &= (flags & EventFlag.NODE_FREED) == 0
        last = leaves & ((flags & EventFlag.LAST_SHARER) != 0)
        freed = events["sharers"][kinds == KIND["remove_node_from_stable_tree"]]
        shared += int(first.sum()) - int(last.sum()) - int((freed > 0).sum())
        sharing += int((joins & ~first).sum()) - int((leaves & ~last).sum())
        sharing -= int(np.maximum(freed - 1, 0).sum())
    totals = state_of(name).totals
    assert (totals.pages_shared, totals.pages_sharing) == (shared, sharing)


@pytest.mark.parametrize("name", NAMES)
def test_every_recording_has_a_state_that_fits_together(name):
    state = state_of(name)
    nodes, items = state.stable_nodes, state.rmap_items
    shares = items["stable_node"] >= 0
    assert ((items["state"] == ItemState.STABLE) == shares).all()
    counts = np.bincount(items["stable_node"][shares], minlength=len(nodes))
    assert (counts == nodes["sharers"]).all()
    places = [(item["mm"], item["address"]) for item in items[shares]]
    assert len(set(places)) == len(places)
    assert set(items["mm"]) <= set(state.mm_slots["mm"])
    assert bool(state.incomplete) == (name == "losses")
    json.dumps(make_content(read(name).header, state))


@pytest.mark.parametrize(
    ("name", "nodes", "sharers"),
    [("duplicates", 7, 303), ("fork", 7, 303), ("cow", 53, 106), ("unique", 0, 0), ("zero", 0, 0)],
)
def test_by_tracepoints_the_sharers_are_those_of_the_merges(name, nodes, sharers):
    state = state_of(name)
    assert state.world == World.TRACEPOINTS
    assert len(state.stable_nodes) == nodes
    assert len(state.sharers()) == sharers
    assert not state.stable_nodes["before_recording"].any()
    assert state.totals.pages_unshared is None
    assert state.totals.stable_node_chains is None
    assert len(state.not_visible) == 3


def test_zero_pages_are_counted_per_process():
    state = state_of("zero")
    assert sorted(state.mm_slots["zero_pages_placed"].tolist()) == [101, 101]
    assert state.totals.zero_pages_placed == 202


def test_chains_hold_the_nodes_of_one_content():
    state = next(state for _, state in iter_states(read("guest-5.10-chains")) if len(state.chains))
    assert state.totals.stable_node_chains == 3
    assert Counter(state.stable_nodes["chain"].tolist()) == dict.fromkeys(
        state.chains["chain"].tolist(), 4
    )
    assert (state.stable_nodes["sharers"] == 7).all()
    assert (state.chains["dups"] == 4).all()
    assert (state.rmap_items["state"] == ItemState.STABLE).sum() == 84


def test_what_is_older_than_the_recording_is_known_once_ksmd_has_looked_at_it():
    name = "guest-6.1-midlife"
    states = [state for _, state in iter_states(read(name))]
    assert (states[0].older.stable_nodes, states[0].older.sharers) == (12, 84)
    assert (states[0].older.known_stable_nodes, states[0].older.known_sharers) == (0, 0)
    state = states[-1]
    assert (state.older.known_stable_nodes, state.older.known_sharers) == (12, 84)
    assert (state.stable_nodes["stable_node"] == 0).all()
    assert (state.stable_nodes["kpfn"] != 0).all()
    assert state.stable_nodes["unseen_sharers"].all()
    assert not state.stable_nodes["placed"].any()
    assert state.sharers()["before_recording"].all()
    assert (state.sharers()["since_ns"] == 0).all()
    assert len(np.unique(state.sharers()["pid"])) == 3


def test_pages_that_moved_keep_their_sharers():
    name = "guest-7.x-moves"
    moved = [state for _, state in iter_states(read(name)) if state.stable_nodes["moved"].any()]
    assert moved
    state = moved[0]
    nodes = state.stable_nodes[state.stable_nodes["moved"] > 0]
    assert set(nodes["nid"].tolist()) <= {0, 1}
    assert (nodes["sharers"] > 0).all()
    assert (nid_of(read(name).header, nodes["kpfn"]) == nodes["nid"]).all()
    end = state_of(name)
    assert (end.totals.pages_shared, end.totals.pages_sharing) == (0, 0)
    assert (end.scan.running, end.scan.seqnr) in ((False, 0), (True, 0), (False, 1), (True, 1))


@pytest.mark.parametrize("kernel", ["5.10", "7.x"])
def test_the_kernels_memory_alone_makes_the_whole_state(kernel, tmp_path):
    tree = tmp_path / kernel
    shutil.copytree(GOLDENS.parent / "kcore" / kernel, tree)
    (tree / "proc/kcore").write_bytes(lzma.decompress((tree / "proc/kcore.xz").read_bytes()))
    memory = read_ksm_memory(tree)
    header = read("guest-5.10-chains").header
    fold = Fold(header)
    fold.take(Witnessed("first", 1, 2, memory, None, {}))
    state = take_snapshot(fold)
    totals = state.totals
    assert (totals.pages_shared, totals.pages_sharing, totals.pages_unshared) == (15, 30, 7)
    assert (totals.stable_node_chains, totals.stable_node_dups) == (3, 15)
    assert state.known_from_memory
    assert not state.incomplete
    assert set(state.stable_nodes["stable_node"]) | set(state.chains["chain"]) == set(
        memory.stable_nodes["stable_node"]
    )
    assert {row.comm for row in find_processes(state)} == {"golden 5", "golden 11"}


# ---- at any time ----


@pytest.mark.parametrize("name", ["guest-7.x-fork-every-page", "duplicates", "losses"])
def test_the_state_at_a_time_is_that_of_the_events_until_then(name):
    header = read(name).header
    events = [batch for batch in batches(name)]
    every = np.sort(np.concatenate([batch["ts_ns"] for batch in events]))
    for at_ns in every[:: max(len(every) // 7, 1)].tolist():
        fold, known = Fold(header), 0
        for batch in events:
            told = told_ns(batch, known)
            known = int(told[-1])
            fold.take_events(batch[told <= at_ns])
        state = state_of(name, at_ns)
        assert state.at_ns == at_ns
        assert sorted(map(bytes, take_snapshot(fold).rmap_items)) == sorted(
            map(bytes, state.rmap_items)
        )


def test_a_time_that_was_passed_before_is_not_folded_from_the_beginning(monkeypatch):
    monkeypatch.setattr("ksmtrace.reconstruct.replay.CHECKPOINT_EVENTS", 50)
    name = "guest-7.x-fork-every-page"
    replay = Replay(lambda: read(name))
    end = replay.state_at()
    whole = replay.nr_folded
    again = replay.state_at()
    assert replay.nr_folded - whole < whole
    for table in ("stable_nodes", "rmap_items", "mm_slots", "chains"):
        assert (getattr(end, table) == getattr(again, table)).all()
    assert (end.totals, end.scan, end.incomplete) == (again.totals, again.scan, again.incomplete)
    middle = (read(name).header.started_ns + end.at_ns) // 2
    fresh = state_of(name, middle)
    assert (replay.state_at(middle).rmap_items == fresh.rmap_items).all()


def test_what_was_lost_by_then_makes_the_state_incomplete():
    name = "losses"
    started_ns = read(name).header.started_ns
    assert not state_of(name, started_ns).incomplete
    end = state_of(name)
    since_ns = min(reason.since_ns for reason in end.incomplete)
    assert state_of(name, since_ns + 1).incomplete
    assert all(reason.lost > 0 for reason in end.incomplete)


def test_a_recording_that_was_cut_off_is_incomplete_since_all_events_had_come(tmp_path):
    whole = read("guest-7.x-churn")
    path = tmp_path / "cut.ksmt"
    path.write_bytes(whole.path.read_bytes()[: 2 * whole.path.stat().st_size // 3])
    replay = Replay(lambda: RecordingReader(path))
    items = list(RecordingReader(path))
    come = sum(len(item.events) for item in items if isinstance(item, Batch))
    settled = [
        item.ts_ns
        for item in items
        if isinstance(item, Losses) and sum(item.produced.values()) <= come
    ]
    state = replay.state_at()
    (reason,) = state.incomplete
    last_ns = max(int(item.events["ts_ns"].max()) for item in items if isinstance(item, Batch))
    assert reason.since_ns == max(settled[-1], last_ns) < state.at_ns and "cut off" in reason.why
    assert not replay.state_at(reason.since_ns).incomplete
    assert replay.state_at(reason.since_ns + 1).incomplete == (reason,)
    assert not state_of("guest-7.x-churn").incomplete


# ---- who shares with whom ----


def test_who_shares_with_whom():
    state = state_of("duplicates")
    processes = find_processes(state)
    assert [row.sharers for row in processes] == [101, 101, 101]
    assert [row.shared_with_others for row in processes] == [101, 101, 101]
    assert {row.comm for row in processes} == {"ksm-dup-0", "ksm-dup-1", "ksm-dup-2"}
    mms, shared = find_sharing(state, 12)
    assert len(mms) == 3
    assert (shared == 101).all()


# ---- histories ----


def test_the_history_of_a_page_that_is_freed_and_of_its_frame():
    name = "guest-7.x-moves"
    header = read(name).header
    events = np.concatenate([np.asarray(b).view("V56") for b in batches(name)]).view(EVENT_DTYPE)
    moves = events[events["kind"] == KIND["ksm_migrate_page"]]
    node = int(moves["stable_node"][0])
    joins = events[(events["kind"] == KIND["stable_tree_append"]) & (events["stable_node"] == node)]
    join = joins[0]
    history = page_history(header, batches(name), int(join["pid"]), int(join["address"]))
    kinds = [int(kind) for kind in history.events["kind"]]
    assert node in history.stable_nodes
    assert history.rmap_items == (int(join["rmap_item"]),)
    of_node = np.count_nonzero(moves["stable_node"] == node)
    assert kinds.count(KIND["ksm_migrate_page"]) == of_node
    assert kinds.index(KIND["stable_tree_append"]) < kinds.index(KIND["ksm_migrate_page"])
    assert (np.diff(history.orders) > 0).all()
    assert (events[history.orders]["ts_ns"] == history.events["ts_ns"]).all()

    last = moves[moves["stable_node"] == node][-1]
    frame = frame_history(header, batches(name), int(last["new_pfn"]))
    assert frame.stable_nodes == (node,)
    told = frame.events[frame.events["kind"] == KIND["stable_tree_append"]]
    assert set(told["rmap_item"].tolist()) >= set(joins["rmap_item"].tolist())
    assert np.count_nonzero(frame.events["kind"] == KIND["ksm_migrate_page"]) == of_node


def test_the_history_of_a_page_by_tracepoints():
    name = "lifetime"
    events = np.concatenate([np.asarray(b).view("V56") for b in batches(name)]).view(EVENT_DTYPE)
    merged = events[(events["kind"] == KIND["ksm_merge_with_ksm_page"]) & (events["ksm_page"] != 0)]
    one = merged[5]
    header = read(name).header
    history = page_history(header, batches(name), int(one["pid"]), int(one["address"]))
    assert (one["rmap_item"],) == history.rmap_items
    assert KIND["ksm_merge_with_ksm_page"] in history.events["kind"]
    assert KIND["ksm_remove_ksm_page"] in history.events["kind"]
    assert not len(page_history(header, batches(name), 1, 4096).events)
    frame = frame_history(header, batches(name), int(one["pfn"]))
    removed = frame.events[frame.events["kind"] == KIND["ksm_remove_rmap_item"]]
    assert (removed["pfn"] == one["pfn"]).all()


# ---- tables ----


def test_stable_order_is_numpys():
    generator = np.random.default_rng(1)
    for low, high in ((0, 5), (0, 1 << 62), (1 << 40, (1 << 40) + 100_000)):
        keys = generator.integers(low, high, 2000).astype(np.uint64)
        assert (stable_order(keys) == np.argsort(keys, kind="stable")).all()
        keys = keys // np.uint64(64) * np.uint64(64) + np.uint64(0xFFFF_8880_0000_0000)
        assert (stable_order(keys) == np.argsort(keys, kind="stable")).all()
    assert len(stable_order(np.empty(0, np.uint64))) == 0


def test_groups_count_within_themselves():
    groups = Groups(np.array([7, 3, 7, 7, 3], np.uint64))
    assert groups.order.tolist() == [1, 4, 0, 2, 3]
    assert groups.keys.tolist() == [3, 7]
    assert groups.last().tolist() == [1, 4]
    marked = np.array([True, False, False, True, True])
    assert groups.count_since_first(marked).tolist() == [1, 1, 0, 1, 2]
    assert Groups(np.empty(0, np.uint64)).last().tolist() == []


def test_a_table_finds_what_was_added():
    table = Table({"value": ("i8", -1)})
    rows = table.find_or_add(np.array([10, 30], np.uint64))
    table["value"][rows] = [1, 3]
    more = table.find_or_add(np.array([5, 10, 20, 30], np.uint64))
    assert table["value"][more].tolist() == [-1, 1, -1, 3]
    assert table.keys[more].tolist() == [5, 10, 20, 30]
    assert table.find(np.array([30, 7], np.uint64)).tolist() == [int(rows[1]), -1]
    copied = table.copy()
    copied["value"][rows] = 9
    assert table["value"][rows].tolist() == [1, 3]


def test_a_plan_without_merges_knows_nothing():
    header = Header("", [], 0, 0, {}, [], [], {})
    fold = Fold(header)
    event = np.zeros(1, EVENT_DTYPE)
    event["kind"], event["mm"] = KIND["ksm_enter"], 64
    event["flags"], event["pid"] = EventFlag.PID_IS_OWNER, 7
    fold.take(Batch(event))
    state = take_snapshot(fold)
    assert state.world == World.NONE
    assert len(state.stable_nodes) == len(state.rmap_items) == 0
    assert state.mm_slots["pid"].tolist() == [7]
    assert len(state.not_visible) == 1


# ---- the command ----


def run(*arguments):
    return subprocess.run(
        [*KSMTRACE, "tree", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", ["guest-5.10-chains", "guest-6.1-midlife", "cow", "losses"])
def test_the_command_in_text(name):
    done = run(GOLDENS / f"{name}.ksmt")
    assert (done.returncode, done.stderr) == (0, "")
    heads = [line.split(":")[0] for line in done.stdout.splitlines() if line[:1].isupper()]
    assert [head.split(",")[0] for head in heads[1:]][:2] == ["TREE", "PROCESSES"]
    assert max(map(len, done.stdout.splitlines()[2:])) <= 120
    begins = {"cow": "COMPLETE", "losses": "INCOMPLETE", "guest-6.1-midlife": "IN PART"}
    assert heads[0].startswith(begins.get(name, "COMPLETE"))


def test_the_command_as_json_at_a_time():
    path = GOLDENS / "guest-5.10-chains.ksmt"
    started_ns = read("guest-5.10-chains").header.started_ns
    at_ns = next(s.end_ns for s, state in iter_states(read(path.stem)) if len(state.chains))
    seconds = (at_ns - started_ns) / 1e9
    done = run(path, "--at", f"{seconds + 0.01:.6f}", "--json", "--top", 2)
    content = json.loads(done.stdout)
    assert content["complete"]
    assert content["totals"]["pages_shared"] == content["counters"]["pages_shared"] == 12
    assert len(content["stable_nodes"]) == 2
    node = content["stable_nodes"][0]
    assert node["chain"] in [chain["chain"] for chain in content["chains"]]
    assert {"kpfn", "nid", "chain", "sharers"} <= node.keys()
    assert {"pid", "comm", "address"} <= node["sharers"][0].keys()
    assert len(node["sharers"]) == 7
    assert node["sharers"][0]["comm"].startswith("ksm-dup-")


@pytest.mark.parametrize("by", ["node", "process", "chain", "nid"])
def test_the_command_with_one_table(by):
    done = run(GOLDENS / "guest-5.10-chains.ksmt", "--by", by, "--at", "-1")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_with_a_history():
    state = state_of("cow")
    item = state.sharers()[0]
    where = f"{item['pid']}:{int(item['address']):x}"
    done = run(GOLDENS / "cow.ksmt", "--address", where)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ksm_merge_with_ksm_page" in done.stdout
    frame = int(state.stable_nodes["kpfn"][item["stable_node"]])
    done = run(GOLDENS / "cow.ksmt", "--pfn", frame, "--json")
    content = json.loads(done.stdout)
    assert [event["event"] for event in content["events"]] == ["ksm_merge_with_ksm_page"] * 2


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["cow", "--at", "99999"], 2, "has no time 99999"),
        (["cow", "--at", "soon"], 2, "is no time"),
        (["cow", "--address", "1:2", "--pfn", "3"], 2, "two histories"),
        (["cow", "--address", "12"], 2, "is no page"),
        (["cow", "--pfn", "3", "--top", "2"], 2, "not cut"),
        (["nothing"], 5, "cannot be read"),
    ],
)
def test_the_command_says_what_cannot_be(arguments, status, says):
    name, *rest = arguments
    done = run(GOLDENS / f"{name}.ksmt", *rest)
    assert done.returncode == status
    assert says in done.stderr
    assert not done.stdout
