"""A recording that begins before it was asked for, in the middle of a stream."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ksmtrace.analysis.live import time_of
from ksmtrace.analysis.recorded import gather
from ksmtrace.analysis.report import make_report
from ksmtrace.errors import UsageError
from ksmtrace.recording import excerpt as excerpt_module
from ksmtrace.recording.excerpt import Backlog
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import Batch, CounterSample

RECORDINGS = Path(__file__).parent.parent / "golden" / "recordings"


def cut(name: str, asked_after: float, path: Path, ends_after: float = 1.0) -> tuple:
    """Follow a recording, and record from somewhere on; returns it and what it should hold."""
    reader = RecordingReader(RECORDINGS / f"{name}.ksmt")
    items = list(reader)
    asked, end = int(len(items) * asked_after), int(len(items) * ends_after)
    backlog = Backlog(reader.header)
    for item in items[:asked]:
        backlog.take(item)
    begin_ns = backlog.begin_ns
    excerpt = backlog.record(path)
    assert excerpt is not None
    for item in items[asked:end]:
        excerpt.write(item)
    if not excerpt.ended:
        excerpt.end("asked to", time_of(items[end - 1]))
    first = next(
        index
        for index, item in enumerate(items)
        if isinstance(item, CounterSample) and item.begin_ns == begin_ns
    )
    expected = [item for item in items[first:end] if isinstance(item, Batch)]
    return gather(RecordingReader(path)), sum(len(item.events) for item in expected)


@pytest.mark.parametrize("name", ["lifetime", "guest-7.x-churn", "guest-6.1-lifetime", "losses"])
@pytest.mark.parametrize("asked_after", [0.3, 0.6, 0.9])
def test_it_begins_in_the_past_and_is_as_complete_as_the_stream(tmp_path, name, asked_after):
    recorded, nr_events = cut(name, asked_after, tmp_path / "part.ksmt")
    original = gather(RecordingReader(RECORDINGS / f"{name}.ksmt"))
    assert len(recorded.events) == nr_events
    assert recorded.header.started_ns == recorded.samples[0].begin_ns
    assert recorded.trailer is not None and recorded.trailer.reason == original.trailer.reason
    lost = sum(recorded.lost().values())
    assert lost <= sum(original.lost().values())
    assert recorded.why_incomplete() == [
        reason for reason in original.why_incomplete() if lost and "ring full" in reason
    ]


def test_its_books_balance_over_its_own_time(tmp_path):
    recorded, nr_events = cut("guest-7.x-churn", 0.5, tmp_path / "part.ksmt", ends_after=0.9)
    assert 0 < nr_events <= 3079
    report = make_report(recorded)
    assert report["complete"] and report["ended_because"] == "asked to"
    verdicts = {entry["counter"]: entry["verdict"] for entry in report["counters"]}
    assert verdicts["pages_sharing"] == "exact"
    assert "contradiction" not in verdicts.values()


def test_only_its_owner_may_read_it_and_nothing_is_overwritten(tmp_path):
    path = tmp_path / "part.ksmt"
    cut("lifetime", 0.5, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UsageError):
        cut("lifetime", 0.5, path)


def test_what_is_remembered_is_bounded(monkeypatch):
    reader = RecordingReader(RECORDINGS / "guest-7.x-churn.ksmt")
    monkeypatch.setattr(excerpt_module, "MOST_EVENTS", 500)
    backlog = Backlog(reader.header)
    for item in reader:
        backlog.take(item)
        held = sum(
            len(one.events) for span in backlog._spans for one in span.items
            if isinstance(one, Batch)
        )  # fmt: skip
        assert held <= 500
