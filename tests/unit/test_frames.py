"""The frames of ksmtrace.analysis: what their documentation says, and what the report says."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from ksmtrace import analysis
from ksmtrace.analysis import df_attempts, df_events, df_samples, df_tallies, make_report
from ksmtrace.analysis.frames import FRAMES, HEADING, markdown
from ksmtrace.events import KINDS

ROOT = Path(__file__).parents[2]
RECORDINGS = ROOT / "tests" / "golden" / "recordings"
NAMES = sorted(path.stem for path in RECORDINGS.glob("*.ksmt"))
DOCUMENT = ROOT / "docs" / "analysis.md"


def rows(frame: pd.DataFrame, *left_out: str):
    """Return the rows as the report's JSON has them."""
    return [
        {name: None if pd.isna(value) else value for name, value in row.items()}
        for row in frame.drop(columns=list(left_out)).to_dict("records")
    ]


def without(rows, *names):
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_has_its_documented_columns(golden, name):
    recorded = golden(name)
    part = analysis.between(recorded, recorded.begin_ns() + 1, recorded.begin_ns() + 2)
    for frame in FRAMES.values():
        documented = [(column, dtype) for column, dtype, _ in frame.columns]
        for of in (recorded, part):
            made = frame.make(of)
            assert [(column, str(dtype)) for column, dtype in made.dtypes.items()] == documented


@pytest.mark.parametrize("name", NAMES)
def test_the_frames_say_what_the_report_says(golden, name):
    recorded = golden(name)
    report = make_report(recorded)
    assert rows(analysis.df_passes(recorded)) == report["scans"]["passes"]
    assert rows(analysis.df_rates(recorded)) == report["rates"]
    assert rows(analysis.df_counters(recorded)) == report["counters"]
    assert rows(analysis.df_processes(recorded), "mm") == without(
        report["processes"], "mm", "shared_with"
    )
    assert [
        {"pid": p["pid"], "comm": p["comm"], "other_pid": o["pid"], "other_comm": o["comm"]}
        | {"pages": o["pages"]}
        for p in report["processes"]
        for o in p["shared_with"]
    ] == rows(analysis.df_sharing(recorded))
    outcomes = df_attempts(recorded)["outcome"].value_counts().to_dict()
    assert outcomes.get("merged", 0) == report["merges"]["succeeded"]
    assert sum(outcomes.values()) == report["merges"]["attempts"]
    routes = report["migrations"]["routes"] if report["migrations"] else []
    assert rows(analysis.df_routes(recorded)) == routes
    calls = {
        name: {"entered": c["entered"], "returned": c["returned"], "missed": c["missed"]}
        | {key: (c["duration"] or {}).get(key) for key in ("median_ns", "p99_ns", "max_ns")}
        for name, c in (report["calls"] or {}).items()
    }
    assert rows(analysis.df_calls(recorded)) == [{"function": n, **c} for n, c in calls.items()]
    slots = [
        {"name": name, **slot}
        for name, topic, key in (
            ("visit_interval_ns", "visits", "visit_interval_ns"),
            ("search_nodes", "visits", "search_nodes"),
            ("cow_ns", "cow", "latency_histogram"),
            ("break_ksm_ns", "unmerges", "duration_histogram"),
        )
        for slot in ((report[topic] or {}).get(key) or {"slots": []})["slots"]
    ]
    assert rows(analysis.df_histograms(recorded)) == slots
    waits = analysis.df_waits(recorded).groupby("lock")["duration_ns"]
    for lock, contention in report["contention"].items():
        by_events = sum(party["total_ns"] for party in contention["waiters"])
        assert waits.sum().to_dict().get(lock, 0) == by_events
    assert rows(analysis.df_profit(recorded)) == report["profit"]["samples"]
    assert rows(analysis.df_page_truth(recorded)) == report["profit"]["page_truth"]
    assert len(analysis.df_cows(recorded)) == (report["events"]["do_wp_page"] or 0)
    assert len(analysis.df_moves(recorded)) == (report["events"]["remove_migration_ptes"] or 0)
    for kind in KINDS:
        assert len(df_events(recorded, kind.name)) == (report["events"][kind.name] or 0)


def test_an_events_frame_has_the_fields_of_its_kind(golden):
    entered = df_events(golden("duplicates"), "ksm_enter")
    names = ["ts_ns", "flags", "err", "pid", "mm", "comm", "ksm_merging_pages", "ksm_rmap_items"]
    assert list(entered) == names
    assert sorted(entered["comm"]) == ["ksm-dup-0", "ksm-dup-1", "ksm-dup-2"]
    with pytest.raises(KeyError):
        df_events(golden("duplicates"), "cow")


def test_the_attempts_of_pinned_pages_have_their_outcomes_and_processes(golden):
    recorded = golden("pinned")
    attempts = df_attempts(recorded)
    assert attempts["outcome"].value_counts().to_dict() == {"merged": 64, "failed": 8, "undone": 5}
    assert (attempts["err"] < 0).sum() == 8
    processes = analysis.df_processes(recorded).set_index("pid")["merged_pages"]
    merged = attempts[attempts["outcome"] == "merged"].groupby("pid").size()
    assert merged.to_dict() == processes[processes > 0].to_dict()


def test_samples_and_tallies_are_all_that_was_read(golden):
    recorded = golden("guest-7.x-moves")
    samples = df_samples(recorded)
    ksm = samples[samples["source"] == "ksm"].pivot(
        index="begin_ns", columns="name", values="value"
    )
    assert ksm["pages_sharing"].tolist() == [s.ksm["pages_sharing"] for s in recorded.samples]
    modes = samples[samples["name"] == "advisor_mode"]
    assert modes["value"].isna().all() and modes["text"].notna().all()
    last = df_tallies(recorded).groupby(["what", "name"])["count"].last()
    assert last["produced"].to_dict() == dict(recorded.losses[-1].produced)
    assert last["counted", "cmp_and_merge_page"] == 434


def test_the_document_is_current():
    written = DOCUMENT.read_text()
    assert written[written.index(HEADING) :] == markdown()
    assert {name for name in analysis.__all__ if name.startswith("df_")} == {*FRAMES, "df_events"}


def test_the_documents_examples_run(tmp_path, monkeypatch):
    shutil.copy(RECORDINGS / "guest-7.x-churn.ksmt", tmp_path / "host.ksmt")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert len(blocks) == 8
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    assert names["recorded"].why_incomplete() == []
    assert names["attempts"]["second"].between(0, 9).all()
    assert (names["passes"]["pages_per_cpu_s"] > 0).any()
    assert 0 < len(names["last_pass"].events) < len(names["recorded"].events)
