"""A recording that begins while ksmd is at work: to attach the programs takes long in a guest."""

import sys
from pathlib import Path

import pytest

from ksmtrace.analysis.recorded import gather
from ksmtrace.analysis.report import make_report
from ksmtrace.claims.claim import Case, Verdict
from ksmtrace.claims.judgement import judge_all
from ksmtrace.claims.table import CLAIMS
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.vm import VmOptions, run_in_vm

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).with_name("guest_busy.py")
# Each of them tells whether a part of what happened was seen, and has much to judge here.
HELD = {"C103.kpfn", "I10", "I14", "I14.order", "I4"}


def test_no_event_tells_of_the_time_before_all_programs_were_attached(
    kernel_of, well_ended, tmp_path
):
    path = tmp_path / "busy.ksmt"
    result = run_in_vm(
        [sys.executable, str(PROGRAM), str(path)],
        kernel_of("6.12"),
        VmOptions(writable=[tmp_path]),
        capture=True,
        timeout_s=1100,
    )
    well_ended(result)
    recorded = gather(RecordingReader(path))
    assert recorded.trailer is not None
    assert recorded.trailer.command_exit_status == 0, result.stderr
    assert recorded.count("cmp_and_merge_page") > 0
    judged = judge_all(CLAIMS, Case(recorded))
    assert [judgement for judgement in judged if judgement.is_fault] == []
    found = {judgement.claim.id: judgement.finding for judgement in judged}
    assert {name: found[name] for name in HELD if found[name].verdict is not Verdict.HOLDS} == {}
    missed = {name: calls["missed"] for name, calls in make_report(recorded)["calls"].items()}
    assert set(missed.values()) == {0}, missed
