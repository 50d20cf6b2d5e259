"""What a workload's run came to: expected against observed, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ksmtrace.workload.kinds import Expectation

Observed = Mapping[str, int | None]


@dataclass(frozen=True)
class ProcessOutcome:
    """One process at the end of one step.

    Attributes:
        pid: of the process.
        comm: its name.
        expected: lines of /proc/PID/ksm_stat, by name.
        observed: the same; None for a line that this kernel does not have, or a process that
            is gone.
    """

    pid: int
    comm: str
    expected: Mapping[str, int]
    observed: Observed


@dataclass(frozen=True)
class StepOutcome:
    """The end of one step.

    Attributes:
        label: the step's.
        passes: passes of ksmd so far.
        expected: change of each counter since the start.
        observed: the same, None for a counter that this kernel does not have.
        processes: in order of appearance.
        ok: whether what was judged is as expected.
        waited_for: what a wait ended without, None where none did.
    """

    label: str
    passes: int
    expected: Mapping[str, int]
    observed: Observed
    processes: tuple[ProcessOutcome, ...]
    ok: bool
    waited_for: str | None

    def differences(self, counters: bool = True) -> list[str]:
        """List what is not as expected, one line each; see :func:`differing`."""
        lines = []
        if counters:
            for name in differing(self.expected, self.observed):
                lines.append(f"{name} {self.expected[name]:+d} (now {self.observed[name]:+d})")
        for process in self.processes:
            for name in differing(process.expected, process.observed):
                lines.append(
                    f"{name} of {process.comm} {process.expected[name]} "
                    f"(now {process.observed[name]})"
                )
        return lines


@dataclass(frozen=True)
class Outcome:
    """A whole run.

    Attributes:
        name: the workload's.
        parameters: with the defaults filled in.
        statement: what was to be done and expected.
        max_page_sharing: in force during the run.
        smart_scan: in force during the run, None where this kernel has no such knob.
        exact: whether the counters were judged; they are not where others use KSM too.
        steps: as far as they were done.
        duration_ns: from the first child's start to the last step's end.
    """

    name: str
    parameters: Mapping[str, int]
    statement: tuple[str, ...]
    max_page_sharing: int
    smart_scan: bool | None
    exact: bool
    steps: tuple[StepOutcome, ...]
    duration_ns: int

    @property
    def ok(self) -> bool:
        """Whether every step's expectation was met."""
        return all(step.ok for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return the run as JSON values: the last step at the top, every step in ``steps``."""
        steps = [_step_json(step) for step in self.steps]
        last = steps[-1]
        return {
            "name": self.name,
            "parameters": dict(self.parameters),
            "statement": list(self.statement),
            "max_page_sharing": self.max_page_sharing,
            "smart_scan": self.smart_scan,
            "exact": self.exact,
            "ok": self.ok,
            **{key: last[key] for key in ("passes", "expected", "observed", "processes")},
            "waited_for": last["waited_for"],
            "steps": steps,
            "duration_ns": self.duration_ns,
        }


def differing(expected: Mapping[str, int], observed: Observed) -> list[str]:
    """Name what was observed and is not as expected; absent counters are not judged."""
    return [
        name
        for name, value in expected.items()
        if observed[name] is not None and observed[name] != value
    ]


def judge(
    label: str,
    passes: int,
    expectation: Expectation,
    counters: Observed,
    processes: list[tuple[int, str, Observed | None]],
    exact: bool,
    waited_for: str | None = None,
) -> StepOutcome:
    """Compare an expectation with what was observed.

    Args:
        label: the step's.
        passes: passes of ksmd so far.
        expectation: of the step.
        counters: their changes since the start.
        processes: pid, comm and figures of each; None for the figures of a process that is gone.
        exact: judge the counters too, not only the processes.
        waited_for: what a wait ended without.
    """
    outcomes = tuple(
        ProcessOutcome(pid, comm, expected, figures or dict.fromkeys(expected))
        for (pid, comm, figures), expected in zip(processes, expectation.processes, strict=True)
    )
    alive = all(figures is not None for _, _, figures in processes)
    ok = (
        waited_for is None
        and alive
        and not (exact and differing(expectation.counters, counters))
        and not any(differing(process.expected, process.observed) for process in outcomes)
    )
    return StepOutcome(label, passes, expectation.counters, counters, outcomes, ok, waited_for)


def _step_json(step: StepOutcome) -> dict[str, Any]:
    return {
        "step": step.label,
        "passes": step.passes,
        "expected": dict(step.expected),
        "observed": dict(step.observed),
        "processes": [
            {
                "pid": process.pid,
                "comm": process.comm,
                **{f"expected_{_short(name)}": n for name, n in process.expected.items()},
                **{name: process.observed[name] for name in process.expected},
            }
            for process in step.processes
        ],
        "ok": step.ok,
        "waited_for": step.waited_for,
    }


def _short(name: str) -> str:
    return name.removeprefix("ksm_")
