from ksmtrace.workload.kinds import Expectation
from ksmtrace.workload.outcome import Outcome, StepOutcome, judge

EXPECTED = Expectation(
    {"pages_shared": 7, "cow_ksm": 0},
    ({"ksm_merging_pages": 11, "ksm_rmap_items": 13},),
)
PROCESS = {"ksm_merging_pages": 11, "ksm_rmap_items": 13}


def judged(counters: dict[str, int | None], process: dict[str, int | None] | None, **more: object):
    processes = [(42, "ksm-dup-0", process)]
    return judge("merged", 2, EXPECTED, counters, processes, **{"exact": True, **more})


def outcome(step: StepOutcome) -> Outcome:
    return Outcome("duplicates", {"pages": 13}, ("It does.",), 256, False, True, (step,), 1_000)


def test_what_is_as_expected_is_ok() -> None:
    step = judged({"pages_shared": 7, "cow_ksm": 0}, PROCESS)
    assert step.ok
    assert step.differences() == []


def test_one_wrong_counter_is_a_mismatch() -> None:
    step = judged({"pages_shared": 5, "cow_ksm": 0}, PROCESS)
    assert not step.ok
    assert step.differences() == ["pages_shared +7 (now +5)"]


def test_one_wrong_process_is_a_mismatch() -> None:
    step = judged({"pages_shared": 7, "cow_ksm": 0}, {**PROCESS, "ksm_merging_pages": 10})
    assert not step.ok
    assert step.differences() == ["ksm_merging_pages of ksm-dup-0 11 (now 10)"]


def test_a_process_that_is_gone_is_a_mismatch() -> None:
    assert not judged({"pages_shared": 7, "cow_ksm": 0}, None).ok


def test_an_absent_counter_is_not_judged() -> None:
    step = judged({"pages_shared": 7, "cow_ksm": None}, PROCESS)
    assert step.ok
    assert outcome(step).to_json()["observed"]["cow_ksm"] is None


def test_with_others_about_only_the_processes_are_judged() -> None:
    counters = {"pages_shared": 5, "cow_ksm": 0}
    assert judged(counters, PROCESS, exact=False).ok
    assert not judged(counters, {**PROCESS, "ksm_rmap_items": 0}, exact=False).ok


def test_a_wait_in_vain_is_never_ok() -> None:
    step = judged({"pages_shared": 7, "cow_ksm": 0}, PROCESS, waited_for="waited 1 s for godot")
    assert not step.ok
    assert outcome(step).to_json()["waited_for"] == "waited 1 s for godot"


def test_json_has_the_last_step_at_the_top() -> None:
    values = outcome(judged({"pages_shared": 7, "cow_ksm": 0}, PROCESS)).to_json()
    assert values["ok"] is True
    assert values["expected"] == {"pages_shared": 7, "cow_ksm": 0}
    assert values["processes"] == [
        {
            "pid": 42,
            "comm": "ksm-dup-0",
            "expected_merging_pages": 11,
            "expected_rmap_items": 13,
            "ksm_merging_pages": 11,
            "ksm_rmap_items": 13,
        }
    ]
    assert values["steps"][-1]["step"] == "merged"
