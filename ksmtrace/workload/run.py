"""Runs a workload: children, passes of ksmd, and the comparison with what was expected."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ksmtrace.errors import CannotRun, KernelFeatureMissing, UsageError, WorkloadFailed
from ksmtrace.kernel.procfs import read_ksm_stat
from ksmtrace.kernel.sysfs import read_ksm
from ksmtrace.kernel.vmstat import read_vmstat
from ksmtrace.workload.children import Children
from ksmtrace.workload.kinds import (
    COUNTERS,
    PROCESS_COUNTERS,
    Churn,
    Fork,
    Kind,
    Plan,
    Scan,
    Step,
    Write,
    statement,
)
from ksmtrace.workload.knobs import SavedKnobs, saved_knobs
from ksmtrace.workload.ksmd import Ksmd
from ksmtrace.workload.outcome import Observed, Outcome, StepOutcome, judge
from ksmtrace.workload.registered import nr_rmap_items, registered_processes
from ksmtrace.workload.signals import Stop, stop_on_signals

_AGAIN_SECONDS = 0.05
_REPORT_SECONDS = 1.0
_NAMED_PROCESSES = 3

Report = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a workload is run.

    Attributes:
        timeout_seconds: bound of each wait.
        hold_seconds: how long to keep the last state before the children end.
        drain: let ksmd forget the children's pages afterwards.
        shared: run although other processes use KSM; then only the workload's own processes
            are judged.
        smart_scan: leave smart_scan as it is, instead of switching it off.
        max_page_sharing: the knob's value for the run, None to leave it as it is.
    """

    timeout_seconds: float = 60.0
    hold_seconds: float = 0.0
    drain: bool = True
    shared: bool = False
    smart_scan: bool = False
    max_page_sharing: int | None = None


def fill_parameters(kind: Kind, given: Mapping[str, int]) -> dict[str, int]:
    """Add a workload's defaults to the parameters given.

    Raises:
        UsageError: it has no such parameter, or the value is below 1.
    """
    for name, value in given.items():
        if name not in kind.defaults:
            takes = ", ".join(f"--{known}" for known in kind.defaults)
            raise UsageError(f"the workload {kind.name} has no --{name}", f"it takes {takes}")
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    return {**kind.defaults, **given}


def run_workload(
    kind: Kind,
    given: Mapping[str, int],
    settings: Settings,
    report: Report,
    announce: Callable[[tuple[str, ...]], None] = lambda lines: None,
    deliver: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run a workload, and leave the machine as it was.

    Must be called from the main thread of a process that has no other: it forks, and it
    catches signals.

    Args:
        kind: of :data:`ksmtrace.workload.kinds.KINDS`.
        given: parameters that are not to have their defaults.
        settings: how to run it.
        report: takes a line of progress.
        announce: takes the statement before anything is done.
        deliver: takes the outcome while the children still hold the last state.

    Returns:
        The outcome, which may be a failed one.

    Raises:
        CannotRun: no privilege, no KSM, another owner of the knobs, other users of KSM.
        UsageError: the parameters do not go together.
        WorkloadFailed: a child did not do its part.
        Interrupted: by a signal.
    """
    parameters = fill_parameters(kind, given)
    with stop_on_signals() as stop, saved_knobs(report) as knobs:
        ksmd = Ksmd(knobs, stop)
        exact = _make_room(ksmd, knobs, settings, report)
        plan = kind.plan(parameters, _set_knobs(knobs, settings, exact))
        _set_for(plan, knobs)
        lines = tuple(statement(plan))
        announce(lines)
        if not exact:
            report("other processes use KSM: only the workload's own processes are judged")
        processes = (*plan.layouts, *plan.heirs)
        ksmd.budget(sum(layout.pages for layout in processes) + nr_rmap_items(read_ksm()))
        base = _read_counters()
        base_passes = ksmd.nr_passes
        begin_ns = time.monotonic_ns()
        with Children(stop, settings.timeout_seconds) as children:
            children.start(plan.layouts, plan.heirs)
            run = _Run(settings, report, stop, ksmd, children, base, base_passes, exact)
            steps = run.steps(plan)
            limit = read_ksm()["max_page_sharing"]
            smart_scan = read_ksm()["smart_scan"]
            assert isinstance(limit, int)
            outcome = Outcome(
                name=kind.name,
                parameters=parameters,
                statement=lines,
                max_page_sharing=limit,
                smart_scan=None if smart_scan is None else bool(smart_scan),
                exact=exact,
                steps=steps,
                duration_ns=time.monotonic_ns() - begin_ns,
            )
            deliver(outcome)
            others = registered_processes(but=[child.pid for child in children.all])
            if exact and others:
                report(f"meanwhile KSM is also in use by {_name(others)}")
            if settings.hold_seconds > 0:
                report(f"holding this state for {settings.hold_seconds:g} s")
                stop.pause(settings.hold_seconds)
        if settings.drain:
            _drain(ksmd, exact, settings)
        else:
            knobs.keep_leftovers = True
        stop.check()
    return outcome


def _make_room(ksmd: Ksmd, knobs: SavedKnobs, settings: Settings, report: Report) -> bool:
    # Returns whether KSM is ours alone, so that its counters can be told in advance.
    others = registered_processes()
    if others and not settings.shared:
        raise CannotRun(
            f"KSM is in use by {_name(others)}",
            "end them, or take approximate figures with --shared",
        )
    ksmd.take_over(settings.smart_scan)
    if others:
        return False
    left = nr_rmap_items(read_ksm())
    if left:
        report(f"waiting for ksmd to forget {left} pages of processes that are gone")
    ksmd.budget(left)
    unmet = ksmd.forget(settings.timeout_seconds)
    if unmet is not None:
        raise CannotRun(f"waited {settings.timeout_seconds:g} s for {unmet.waited_for}, in vain")
    return True


def _set_knobs(knobs: SavedKnobs, settings: Settings, exact: bool) -> int:
    # Returns max_page_sharing.
    if exact and "merge_across_nodes" in knobs:
        knobs.set(merge_across_nodes=1)
    if settings.max_page_sharing is not None:
        if settings.max_page_sharing < 2:
            raise UsageError("--max-page-sharing must be at least 2")
        knobs.set(max_page_sharing=settings.max_page_sharing)
    limit = read_ksm()["max_page_sharing"]
    assert isinstance(limit, int)
    return limit


def _set_for(plan: Plan, knobs: SavedKnobs) -> None:
    if "use_zero_pages" in plan.knobs and read_ksm()["ksm_zero_pages"] is None:
        raise KernelFeatureMissing(
            "this kernel does not count the zero pages that KSM maps",
            "use a kernel with /sys/kernel/mm/ksm/ksm_zero_pages",
        )
    if "use_zero_pages" in knobs:
        knobs.set(**{"use_zero_pages": 0, **plan.knobs})


def _drain(ksmd: Ksmd, exact: bool, settings: Settings) -> None:
    if not exact or registered_processes():
        # One pass visits every process that is gone; the others' pages are to stay known.
        ksmd.run_pass(settings.timeout_seconds)
        return
    unmet = ksmd.forget(settings.timeout_seconds)
    if unmet is not None:
        raise WorkloadFailed(
            f"waited {settings.timeout_seconds:g} s for {unmet.waited_for}, in vain"
        )


def _name(processes: Mapping[int, str]) -> str:
    named = [f"{comm} (pid {pid})" for pid, comm in processes.items()]
    more = f" and {len(named) - _NAMED_PROCESSES} more" if len(named) > _NAMED_PROCESSES else ""
    return ", ".join(named[:_NAMED_PROCESSES]) + more


def _read_counters() -> dict[str, int | None]:
    values = {**read_ksm(), **read_vmstat()}
    counters: dict[str, int | None] = {}
    for name in COUNTERS:
        value = values[name]
        counters[name] = value if isinstance(value, int) else None
    return counters


class _Run:
    def __init__(
        self,
        settings: Settings,
        report: Report,
        stop: Stop,
        ksmd: Ksmd,
        children: Children,
        base: Observed,
        base_passes: int,
        exact: bool,
    ) -> None:
        self.settings = settings
        self.report = report
        self.stop = stop
        self.ksmd = ksmd
        self.children = children
        self.base = base
        self.base_passes = base_passes
        self.exact = exact
        self.generation = 0

    def steps(self, plan: Plan) -> tuple[StepOutcome, ...]:
        done = []
        for step in plan.steps:
            done.append(self._do(step))
            if not done[-1].ok:
                break
        return tuple(done)

    def _do(self, step: Step) -> StepOutcome:
        match step.action:
            case Scan(passes):
                return self._scan(step, passes, rewrite=False)
            case Churn(passes):
                return self._scan(step, passes, rewrite=True)
            case Fork():
                self.children.fork_heirs()
            case Write(pages):
                self.children.write_first(pages)
        return self._judge(step)

    def _scan(self, step: Step, passes: int, rewrite: bool) -> StepOutcome:
        seconds = self.settings.timeout_seconds
        deadline = time.monotonic() + seconds
        reported = time.monotonic()
        changes = [
            f"{name} {change:+d}" for name, change in step.expected.counters.items() if change
        ]
        self.report(
            f"{step.label}: waiting for {', '.join(changes) or 'no change'}; full_scans "
            f"{passes:+d}; at most {seconds:g} s"
        )
        begin = self.ksmd.nr_passes
        while True:
            if rewrite:
                self.generation += 1
                self.children.rewrite(self.generation)
            in_time = self.ksmd.run_pass(deadline - time.monotonic())
            done = self.ksmd.nr_passes - begin
            if done < passes and in_time:
                continue
            outcome = self._judge(step)
            if outcome.ok:
                return outcome
            wanted = self._wanted(outcome, passes, done)
            if not in_time or time.monotonic() >= deadline:
                return self._judge(step, f"waited {seconds:g} s for {wanted}")
            if time.monotonic() - reported >= _REPORT_SECONDS:
                reported = time.monotonic()
                self.report(f"{step.label}: waiting for {wanted}")
            # What kept a page from merging, such as a reference to it, must be given time to go.
            self.stop.pause(_AGAIN_SECONDS)

    def _wanted(self, outcome: StepOutcome, passes: int, done: int) -> str:
        differences = outcome.differences(self.exact)
        if done < passes or not differences:
            return f"full_scans {passes:+d} (now {done:+d})"
        return f"{', '.join(differences)}; full_scans {done:+d}"

    def _judge(self, step: Step, waited_for: str | None = None) -> StepOutcome:
        now = _read_counters()
        changes: dict[str, int | None] = {}
        for name in COUNTERS:
            value, before = now[name], self.base[name]
            changes[name] = None if value is None or before is None else value - before
        return judge(
            step.label,
            self.ksmd.nr_passes - self.base_passes,
            step.expected,
            changes,
            [(child.pid, child.comm, _read_process(child.pid)) for child in self.children.all],
            self.exact,
            waited_for,
        )


def _read_process(pid: int) -> dict[str, int | None] | None:
    stat = read_ksm_stat(pid)
    if stat is None:
        return None
    figures: dict[str, int | None] = {}
    for name in PROCESS_COUNTERS:
        value = stat[name]
        figures[name] = value if isinstance(value, int) else None
    return figures
