"""The trees of the running kernel, live and from a recording, beside what is really mapped."""

import json
import os
import signal

import pytest

from ksmtrace.kernel.page_truth import read_page_truth
from ksmtrace.kernel.sysfs import read_ksm
from ksmtrace.stream import Witnessed

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("clean")]

MERGED = ("duplicates", "--pages", "503", "--contents", "11", "--max-page-sharing", "19")


def asked(live, path):
    return [
        item
        for item in live.readable(path)
        if isinstance(item, Witnessed) and item.moment == "asked"
    ]


def test_a_recording_with_witnesses_is_what_is_mapped(live, tmp_path):
    path = tmp_path / "f.ksmt"
    with live.recording(path, "--witnesses") as recorder:
        with live.holding(*live.workload(*MERGED)) as outcome:
            assert outcome["ok"] is True, outcome
            recorder.process.send_signal(signal.SIGUSR1)
            (reading,) = live.wait_until(lambda: asked(live, path))
        ended = recorder.end()
    assert ended.status == 0
    assert "what the kernel holds was read, in " in ended.stderr

    done = live.run("tree", str(path), "--verify", "--json")
    assert done.returncode == 0, done.stdout
    moments = {entry["moment"]: entry for entry in json.loads(done.stdout)["verify"]}
    assert list(moments) == ["first", "asked", "last"]
    # Without /proc/kcore, and where kallsyms lists no data, too.
    assert reading.memory is not None, reading.why_not
    entry = moments["asked"]
    assert entry["reconstruction_and_memory"]["contradictions"] == 0
    assert entry["memory_itself"]["contradictions"] == 0
    assert entry["memory_and_pages"]["compared"] == {"sharers": 3 * 503, "pages": 3 * 503}
    assert entry["memory_and_pages"]["differences"] == []


def test_the_live_tree_is_what_is_mapped_and_what_ksm_counts(live):
    with live.holding(*live.workload(*MERGED)) as outcome:
        assert outcome["ok"] is True, outcome
        shown = live.run("tree", "--json")
        text = live.run("tree", "--by", "process")
        pages, ksm = read_page_truth(), read_ksm()
    assert (shown.returncode, text.returncode) == (0, 0), shown.stderr + text.stderr
    assert shown.stderr == text.stderr == ""
    tree = json.loads(shown.stdout)
    assert tree["kernel"]["release"] == os.uname().release
    for counter in ("pages_shared", "pages_sharing"):
        assert tree["totals"][counter] == tree["counters"][counter] == ksm[counter]

    expected: dict[int, list[tuple[int, str]]] = {}
    for page in pages.pages:
        place = (int(page["pid"]), f"{page['address']:#x}")
        expected.setdefault(int(page["pfn"]), []).append(place)
    assert {
        node["kpfn"]: sorted((s["pid"], s["address"]) for s in node["sharers"])
        for node in tree["stable_nodes"]
    } == {pfn: sorted(places) for pfn, places in expected.items()}
    names = {process["comm"] for process in tree["processes"]}
    assert {s["comm"] for node in tree["stable_nodes"] for s in node["sharers"]} == names
    assert all(name in text.stdout for name in names)
    assert tree["world"] == "memory"
    assert {node["chain"] is None for node in tree["stable_nodes"]} == {False}


def test_without_root_it_says_what_is_missing(live):
    done = live.run("tree", user=65534, group=65534, extra_groups=[])
    assert (done.returncode, done.stdout) == (3, "")
    assert "HINT: run as root" in done.stderr
    assert "Traceback" not in done.stderr
