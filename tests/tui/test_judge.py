"""Claims are judged beside everything else: in a program of its own, of lowest priority."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from ksmtrace.claims.claim import Finding, Verdict
from ksmtrace.tui import judge
from ksmtrace.tui.draw import Look
from ksmtrace.tui.moment import Judged
from ksmtrace.tui.overview import alarm_lines


def judging(engine):
    process = engine._judge_apart and engine._judge_apart._process
    return process and process.pid


def test_it_is_of_lowest_priority_and_of_this_session(tui):
    engine = tui.live_engine("cow")
    engine.start()
    tui.wait(lambda: engine.shown.picture is not None)
    engine.ask_claims()
    tui.wait(lambda: engine.shown.judged is not None)
    pid = judging(engine)
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    assert os.getsid(pid) == os.getsid(0)
    assert engine.shown.judged.took_s > 0
    engine.ask_claims()
    tui.wait(lambda: not engine._judging)
    assert judging(engine) == pid
    engine.stop()
    assert engine.join() and judging(engine) is None


def test_however_long_it_takes_moments_come_and_the_end_does(tui, monkeypatch):
    never = [sys.executable, "-c", "import time; time.sleep(1000)"]
    monkeypatch.setattr(judge, "_PROGRAM", never)
    engine = tui.live_engine("cow")

    async def act(pilot, app):
        await pilot.press("6")
        await tui.until(pilot, lambda: judging(engine))
        number = app.shown.number
        await tui.until(pilot, lambda: app.shown.number > number + 4)
        assert "judging" in tui.text_of(app)

    tui.drive(engine, act)
    assert judging(engine) is None


def test_where_it_is_killed_that_is_said_and_the_next_one_judges(tui):
    engine = tui.live_engine("cow")
    engine.start()
    tui.wait(lambda: engine.shown.picture is not None)
    engine.ask_claims()
    tui.wait(lambda: judging(engine))
    os.kill(judging(engine), 9)
    tui.wait(lambda: engine.shown.judged is not None)
    assert "was ended" in engine.shown.judged.why_not and engine.crashed is None
    tui.wait(lambda: not engine._judging)
    engine.ask_claims()
    tui.wait(lambda: engine.shown.judged.judgements)
    engine.stop()
    assert engine.join()


def test_a_violated_claim_is_an_alarm_without_anybody_asking(tui, monkeypatch):
    monkeypatch.setattr("ksmtrace.tui.app._JUDGE_S", 0.1)
    engine = tui.replay("guest-7.x-churn")
    tui.drive(engine, lambda pilot, app: tui.until(pilot, lambda: app.shown.judged is not None))
    shown = engine.shown
    assert "violated" not in str(alarm_lines(shown, Look(79)))
    one, *others = (one for one in shown.judged.judgements if one.claim.refuted is None)
    fault = replace(one, finding=Finding(Verdict.VIOLATED, "3 of 4 were not"))
    broken = replace(shown, judged=Judged((fault, *others), "the whole recording"))
    says = " ".join(text for line in alarm_lines(broken, Look(79)) for text, _ in line)
    assert f"! {one.claim.id} is violated: 3 of 4 were not" in says


def test_a_fault_in_judging_ends_no_capture(tui):
    engine = tui.live_engine("cow")
    engine._to_judge = lambda: 1 / 0
    engine.start()
    tui.wait(lambda: engine.shown.picture is not None)
    engine.ask_claims()
    tui.wait(lambda: engine.shown.judged is not None)
    assert "by a fault in ksmtrace: ZeroDivisionError" in engine.shown.judged.why_not
    assert engine.crashed is None and not engine.stopping
    engine.stop()
    assert engine.join()
