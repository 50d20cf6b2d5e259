"""The engine of a live capture: nothing is lost but drawing, and all ends in order."""

from __future__ import annotations

import threading

import pytest

from ksmtrace.analysis.recorded import gather
from ksmtrace.analysis.report import make_report
from ksmtrace.errors import BackendUnavailable, CannotRun
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.tui.live import LiveEngine
from ksmtrace.tui.moment import PageSavings, Phase


def test_the_last_picture_holds_the_reports_figures(tui):
    engine = tui.live_engine("guest-7.x-churn", ends=True)
    engine.start()
    tui.wait(lambda: engine.shown.phase is Phase.ENDED)
    assert engine.join()
    report = make_report(gather(RecordingReader(tui.recordings / "guest-7.x-churn.ksmt")))
    picture = engine.shown.picture
    assert picture.merges.succeeded == report["merges"]["succeeded"] == 661
    assert picture.passes.completed == report["scans"]["completed"]
    assert picture.nr_events == 3079


def test_what_comes_too_fast_is_not_drawn_but_counted_and_recorded(tui, tmp_path):
    begun = threading.Event()
    path = tmp_path / "all.ksmt"
    engine = tui.live_engine("guest-7.x-churn", most_waiting=100, ends=True, times=1)
    # Folding does not begin before everything has come: the worst case.
    fold = engine._fold
    engine._fold = lambda: (begun.wait(), fold())
    engine.record(path)
    engine.start()
    tui.wait(engine._capture_ended.is_set)
    assert engine._nr_waiting <= 100
    begun.set()
    assert engine.join()
    picture = engine.shown.picture
    assert picture.skipped + picture.nr_events == 3079 and picture.skipped > 2900
    assert sum(picture.by_kind.values()) == 3079
    recorded = gather(RecordingReader(path))
    assert len(recorded.events) == 3079 and recorded.why_incomplete() == []


def test_a_capture_that_fails_keeps_what_it_has_and_says_why(tui):
    failure = CannotRun("the ring has gone", "look at dmesg")
    engine = tui.live_engine("duplicates", failure=failure)

    async def act(pilot, app):
        await tui.until(pilot, lambda: app.shown.phase is Phase.FAILED)
        await tui.drawn(pilot)
        text = tui.text_of(app)
        assert text.startswith("FAILED")
        assert "the ring has gone (look at dmesg)" in text
        assert app.shown.picture.merges.succeeded == 303
        await pilot.press("space")
        await tui.drawn(pilot)
        assert tui.text_of(app).startswith("FAILED")

    app = tui.drive(engine, act)
    assert app.engine.failure is failure


def test_a_capture_that_does_not_begin_ends_the_application_with_its_status(tui):
    def refuse(asked):
        raise BackendUnavailable("bcc is not installed", "apt-get install python3-bpfcc")

    engine = LiveEngine(refuse)
    import asyncio

    from ksmtrace.tui.app import Top

    app = Top(engine)

    async def run():
        async with app.run_test(size=(80, 24)) as pilot:
            await tui.until(pilot, lambda: app.return_code is not None or app._exit)

    asyncio.run(run())
    assert app.return_code == 3
    assert str(engine.failure) == "bcc is not installed"


def test_the_first_screen_is_there_before_the_programs_are(tui):
    attached = threading.Event()
    reader = RecordingReader(tui.recordings / "cow.ksmt")
    early = next(item for item in reader if type(item).__name__ == "CounterSample")

    def slow(asked):
        attached.wait()
        raise CannotRun("enough seen")

    engine = LiveEngine(slow, read_early=lambda: early)
    import asyncio

    from ksmtrace.tui.app import Top

    app = Top(engine)

    async def run():
        async with app.run_test(size=(80, 24)) as pilot:
            await tui.until(pilot, lambda: "loading and attaching" in tui.text_of(app))
            text = tui.text_of(app)
            assert text.startswith("STARTING")
            assert "max_page_sharing   256" in text
            await pilot.press("q")

    asyncio.run(run())
    attached.set()
    assert engine.join() and app.return_code == 0


def test_r_records_from_the_moment_before_until_r_again(tui, tmp_path):
    engine = tui.live_engine("guest-6.1-lifetime")

    async def act(pilot, app):
        await tui.until(pilot, lambda: app.shown.can_record is not None)
        await pilot.press("r")
        # Nothing comes any more: the recording begins with the next item, here the trailer.
        await pilot.press("q")

    tui.drive(engine, act)
    (path,) = tmp_path.iterdir()
    recorded = gather(RecordingReader(path))
    assert len(recorded.events) == 1252 and recorded.why_incomplete() == []
    assert engine.shown.recorder.nr_events == 1252


def test_a_recording_that_cannot_be_written_is_told(tui, tmp_path):
    engine = tui.live_engine("guest-6.1-lifetime", ends=True)
    engine.record(tmp_path / "no" / "such" / "place.ksmt")
    engine.start()
    assert engine.join()
    assert "not recorded" in engine.shown.recorder.says


def test_page_truth_is_read_when_asked_for(tui):
    savings = PageSavings(1, frames=53, places=95)
    engine = tui.live_engine("cow")
    engine._read_savings = lambda: savings

    async def act(pilot, app):
        assert "w reads it" in tui.text_of(app)
        await pilot.press("w")
        await tui.until(pilot, lambda: app.shown.savings is savings)
        await tui.drawn(pilot)
        assert "168.0 KiB" in tui.text_of(app)  # 42 pages

    tui.drive(engine, act)


def test_a_knob_is_changed_only_after_a_yes_and_shown_as_changed(tui, monkeypatch):
    written = []

    def change(name, value):
        written.append((name, value))
        return "20"

    monkeypatch.setattr("ksmtrace.workload.change.change_knob", change)
    engine = tui.live_engine("cow")

    async def act(pilot, app):
        for answer in ("n", "y"):
            await pilot.press("k")
            await tui.until(pilot, lambda: len(app.screen_stack) == 2)
            await pilot.press("down", "enter")  # run, sleep_millisecs
            await tui.until(pilot, lambda: app.screen.query("Input"))
            await pilot.press(*["backspace"] * 6, *"101", "enter")
            await tui.until(pilot, lambda: "STAYS" in tui.text_of(app))
            assert written == []
            await pilot.press(answer)
            await tui.until(pilot, lambda: len(app.screen_stack) == 1)
        await tui.until(pilot, lambda: app.changed)
        await tui.drawn(pilot)
        assert "CHANGED, was 20" in tui.text_of(app)

    tui.drive(engine, act, (120, 40))
    assert written == [("sleep_millisecs", "101")]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_in_order(tui, number):
    import os
    import signal

    engine = tui.live_engine("cow")

    async def act(pilot, app):
        os.kill(os.getpid(), getattr(signal, number))
        await tui.until(pilot, lambda: app._exit)

    assert tui.drive(engine, act).return_code == 0
    assert engine.shown.phase is Phase.ENDED
