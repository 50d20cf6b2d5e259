"""Recording the known workloads on the running kernel, against independent witnesses."""

import contextlib
import json
import signal
import sys

import pytest

from ksmtrace.capture.plan import make_plan
from ksmtrace.capture.session import Capture, CaptureSettings
from ksmtrace.kernel.facts import read_facts
from ksmtrace.kernel.procfs import read_ksm_stat
from ksmtrace.kernel.sysfs import read_ksm
from ksmtrace.stream import Batch, CounterSample, Losses, ProcessSeen

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("clean")]

# Per workload: events per kind, merges per process, and the change of each counter; all of it
# follows from the parameters.
WORKLOADS = {
    "duplicates": (("--processes", "3", "--pages", "211", "--contents", "5"), 633, 5),
    "unique": (("--processes", "2", "--pages", "211"), 0, 0),
    "volatile": (("--processes", "2", "--pages", "101", "--passes", "3"), 0, 0),
    "zero": (("--processes", "2", "--pages", "211"), 0, 0),
    "fork": (("--pages", "211", "--contents", "5", "--forks", "2"), 633, 5),
    "cow": (("--processes", "2", "--pages", "101", "--writes", "23"), 202, 101),
}
EQUAL = ("full_scans", "pages_shared", "pages_sharing", "ksm_zero_pages")


def entries(content):
    return {entry["counter"]: entry for entry in content["counters"]}


@pytest.mark.parametrize("name", WORKLOADS)
def test_events_counters_and_processes_agree_exactly(live, tmp_path, name):
    options, merged, nodes = WORKLOADS[name]
    path = tmp_path / "f.ksmt"
    with live.recording(path) as recorder:
        before = read_ksm()
        with live.holding(*live.workload(name, *options)) as outcome:
            assert outcome["ok"] is True, outcome
            after = read_ksm()
            witnesses = {p["pid"]: read_ksm_stat(p["pid"]) for p in outcome["processes"]}
            ended = recorder.end()
    assert (ended.status, ended.summary["lost"]) == (0, 0)
    content = live.report(path)
    assert (content["complete"], content["lost"]) == (True, 0)
    assert ended.summary["events"] == sum(filter(None, content["events"].values()))

    assert content["merges"]["attempts"] == content["merges"]["succeeded"] == merged
    assert content["merges"]["new_stable_nodes"] == nodes
    assert content["merges"]["failed"] == {}
    assert content["merges"]["success_rate"] == (1.0 if merged else None)
    assert content["events"]["ksm_merge_with_ksm_page"] == merged
    assert content["scans"]["completed"] == outcome["passes"]

    left = outcome["parameters"].get("writes", 0)  # pages that left singly: no event
    counters = entries(content)
    for counter in EQUAL:
        entry = counters[counter]
        assert entry["delta"] == after[counter] - before[counter], counter
        if counter == "pages_sharing" and left:
            assert (entry["difference"], entry["verdict"]) == (-left, "explained")
        else:
            assert (entry["difference"], entry["verdict"]) == (0, "exact"), counter
    assert counters["pages_shared"]["delta"] == nodes
    assert content["zero_pages"]["succeeded"] == after["ksm_zero_pages"] - before["ksm_zero_pages"]
    assert content["zero_pages"]["succeeded"] == outcome["expected"]["ksm_zero_pages"]
    assert counters["cow_ksm"]["delta"] == left
    assert content["trees"]["unstable_rmap_items"] == outcome["expected"]["pages_unshared"]

    processes = {process["pid"]: process for process in content["processes"]}
    assert set(processes) == set(witnesses)
    for index, expected in enumerate(outcome["processes"]):
        process, witness = processes[expected["pid"]], witnesses[expected["pid"]]
        assert process["comm"] == expected["comm"]
        assert process["ksm_merging_pages"] == witness["ksm_merging_pages"]
        assert process["ksm_rmap_items"] == witness["ksm_rmap_items"]
        assert process["zero_merged_pages"] == witness["ksm_zero_pages"]
        gone = left if index == 0 else 0
        assert process["merged_pages"] - gone == witness["ksm_merging_pages"]
        assert process["difference"] == -gone


def test_processes_that_came_up_just_before_the_end_are_in_the_last_sample(live):
    facts = read_facts()
    with contextlib.ExitStack() as held:
        outcome = {}

        def until():
            workload = live.workload("duplicates", "--pages", "23", "--contents", "5")
            outcome.update(held.enter_context(live.holding(*workload)))
            return "all of it between the last look into the ring and the end"

        settings = CaptureSettings(snapshot=False)
        with Capture(facts, make_plan(facts), settings, until) as capture:
            samples = [item for item in capture if isinstance(item, CounterSample)]
        pids = [process["pid"] for process in outcome["processes"]]
        merging = {pid: read_ksm_stat(pid)["ksm_merging_pages"] for pid in pids}
    assert merging == dict.fromkeys(pids, 23)
    told = samples[-1].processes
    assert {pid: told[pid]["ksm_merging_pages"] for pid in pids if pid in told} == merging


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_recorded_command_is_followed_to_its_end(live, tmp_path, name):
    path = tmp_path / "f.ksmt"
    done = live.run(
        *("record", "--json", "-o", str(path), "--"),
        *(*live.ksmtrace, "workload", name, *WORKLOADS[name][0], "--json"),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["lost"], summary["command_exit_status"]) == (0, 0)
    content = live.report(path)
    assert content["complete"] is True
    assert content["ended_because"] == "command ended"
    assert content["events"]["ksm_enter"] == content["events"]["ksm_exit"] > 0
    # Every process has ended, and ksmd has forgotten its pages.
    assert all(entries(content)[counter]["delta"] in (0, None) for counter in EQUAL[1:])
    assert {p["comm"][:4] for p in content["processes"]} == {"ksm-"}
    assert all(p["counted_by"] == "ksm_exit" for p in content["processes"])
    assert {p["cgroup"] for p in content["processes"]} == {own_cgroup(content)}


def own_cgroup(content):
    cgroups = {process["cgroup"] for process in content["processes"]}
    assert len(cgroups) == 1
    return cgroups.pop()


def test_pages_that_are_pinned_fail_and_are_undone(live, tmp_path):
    path = tmp_path / "f.ksmt"
    pairs, tree_pinned, pinned = 60, 11, 7
    with (
        live.recording(path) as recorder,
        live.holding(*live.pinned, str(pairs), str(tree_pinned), str(pinned)) as outcome,
    ):
        witness = read_ksm_stat(outcome["pid"])
        recorder.end()
    content = live.report(path)
    merged = 2 * (pairs - tree_pinned - pinned)
    assert content["merges"]["failed"] == {"EFAULT": tree_pinned + pinned, "undone": tree_pinned}
    assert content["merges"]["failed_by_cause"] == {"extra_reference": tree_pinned + pinned}
    assert content["merges"]["succeeded"] == merged == witness["ksm_merging_pages"]
    (process,) = content["processes"]
    assert process["failed_attempts"] == 2 * tree_pinned + pinned
    assert process["difference"] == 0
    assert entries(content)["cow_ksm"]["delta"] == tree_pinned  # break_cow
    assert entries(content)["pages_sharing"]["verdict"] == "exact"


def test_a_process_already_merged_before_the_recording_is_counted_from_its_first_sample(
    live, tmp_path
):
    path = tmp_path / "f.ksmt"
    with (
        live.holding(*live.workload("duplicates", "--pages", "50")) as outcome,
        live.recording(path) as recorder,
    ):
        recorder.end()
    content = live.report(path)
    processes = {process["pid"]: process for process in content["processes"]}
    for expected in outcome["processes"]:
        process = processes[expected["pid"]]
        assert process["comm"] == expected["comm"]
        assert process["merged_pages"] == 0
        assert process["first_merging_pages"] == process["ksm_merging_pages"] == 50
    assert sum(filter(None, content["events"].values())) == 0


def test_a_reset_of_full_scans_is_no_contradiction(live, tmp_path):
    path = tmp_path / "f.ksmt"
    unmerging = (
        "from ksmtrace.workload.knobs import saved_knobs\n"
        "with saved_knobs() as knobs: knobs.set(run=2)"
    )
    assert live.run("workload", "unique", "--pages", "10").returncode == 0
    assert read_ksm()["full_scans"] > 0
    with live.recording(path) as recorder:
        done = live.run_python(unmerging)
        assert done.returncode == 0, done.stderr
        with live.holding(*live.workload("unique", "--pages", "10")):
            recorder.end()
    content = live.report(path)
    assert entries(content)["full_scans"]["verdict"] == "explained"
    assert not any("fault" in finding for finding in content["findings"])


def test_a_paused_consumer_with_a_tiny_ring_loses_events_and_counts_each(live, tmp_path):
    path = tmp_path / "f.ksmt"
    with live.recording(path, "--ring", "4K", "--interval", "0.05") as recorder:
        recorder.process.send_signal(signal.SIGSTOP)
        with live.holding(*live.workload("duplicates", "--pages", "200")) as outcome:
            assert outcome["ok"] is True
            recorder.process.send_signal(signal.SIGCONT)
            ended = recorder.end()
    items = live.readable(path)
    losses = [item for item in items if isinstance(item, Losses)][-1]
    content = live.report(path)
    for kind, produced in losses.produced.items():
        assert produced == (content["events"][kind] or 0) + losses.dropped[kind], kind
    assert losses.produced["ksm_merge_with_ksm_page"] == 600
    assert losses.produced["ksm_enter"] == 3
    assert losses.produced["ksm_stop_scan"] == outcome["passes"]
    assert ended.status == 0
    assert ended.summary["lost"] == content["lost"] == sum(losses.dropped.values()) > 0
    assert content["lost_by_kind"] == dict(losses.dropped)
    assert content["complete"] is False
    assert any("found the ring full" in reason for reason in content["incomplete_because"])
    # What would need the lost events is unknown.
    assert {entries(content)[counter]["verdict"] for counter in EQUAL} == {"unknown"}
    assert content["merges"]["success_rate"] is None
    assert {process["difference"] for process in content["processes"]} == {None}
    # What was recorded is in order.
    times = [t for item in items if isinstance(item, Batch) for t in item.events["ts_ns"].tolist()]
    assert times == sorted(times)


def test_a_process_that_vanishes_at_once_keeps_its_name(live, tmp_path):
    path = tmp_path / "f.ksmt"
    vanishing = (
        "import ctypes, mmap, os\n"
        "ctypes.CDLL(None).prctl(15, b'vanishing-act', 0, 0, 0)\n"
        "memory = mmap.mmap(-1, 8192, flags=34)\n"
        "memory[0] = 1\n"
        "memory.madvise(12)\n"
        "os._exit(0)\n"
    )
    done = live.run(
        "record", "-q", "--json", "-o", str(path), "--", sys.executable, "-c", vanishing
    )
    assert done.returncode == 0, done.stderr
    content = live.report(path)
    (process,) = content["processes"]
    assert process["comm"] == "vanishing-act"
    assert process["counted_by"] == "ksm_exit"
    assert process["ksm_merging_pages"] == 0
    assert process["cgroup"] not in (None, "/")


def test_a_command_that_a_signal_ends_is_told_of(live, tmp_path):
    path = tmp_path / "f.ksmt"
    crash = (sys.executable, "-c", "import os; os.kill(os.getpid(), 11)")
    done = live.run("record", "-o", str(path), "--", *crash)
    assert done.returncode == 0
    assert "SIGSEGV" in done.stderr.splitlines()[-1]
    assert "SIGSEGV" in live.run("report", str(path)).stdout
    done = live.run("record", "--json", "-f", "-o", str(path), "--", *crash)
    assert json.loads(done.stdout)["command_exit_status"] == -11
    assert live.report(path)["command_exit_status"] == -11


def test_the_exit_status_of_the_command_is_told_of(live, tmp_path):
    path = tmp_path / "f.ksmt"
    done = live.run("record", "-o", str(path), "--", "sh", "-c", "exit 7")
    assert done.returncode == 0
    assert "exit status was 7" in done.stderr
    assert live.report(path)["command_exit_status"] == 7


def test_the_duration_ends_the_command_and_the_recording(live, tmp_path):
    path = tmp_path / "f.ksmt"
    done = live.run("record", "--json", "-d", "0.2", "-o", str(path), "--", "sleep", "1000")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command_exit_status"] == -signal.SIGTERM
    assert live.report(path)["ended_because"] == "duration"


def test_the_commands_output_stays_apart_from_the_summary(live, tmp_path):
    path = tmp_path / "f.ksmt"
    done = live.run("record", "-o", str(path), "--", "echo", "hello")
    assert done.stdout == "hello\n"
    done = live.run("record", "-f", "--json", "-o", str(path), "--", "echo", "hello")
    assert json.loads(done.stdout)["file"] == str(path)
    assert "hello" in done.stderr


def test_recording_nothing_is_complete_and_samples_the_counters(live, tmp_path):
    path = tmp_path / "f.ksmt"
    done = live.run("record", "--json", "-d", "0", "-o", str(path))
    assert done.returncode == 0, done.stderr
    content = live.report(path)
    assert content["complete"] is True
    assert len(entries(content)) > 20
    assert content["merges"]["attempts"] == 0


def test_short_lived_processes_get_their_own_names(live, tmp_path):
    path = tmp_path / "f.ksmt"
    with (
        live.recording(path) as recorder,
        live.holding(*live.workload("fork", "--pages", "20", "--contents", "3")) as outcome,
    ):
        recorder.end()
    told = {item.pid: item for item in live.readable(path) if isinstance(item, ProcessSeen)}
    for expected in outcome["processes"]:
        assert told[expected["pid"]].comm == expected["comm"]
