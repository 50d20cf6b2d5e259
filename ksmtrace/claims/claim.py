"""What a claim is, what it is judged on, and what a judgement says."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ksmtrace.analysis.recorded import Recorded
from ksmtrace.capture.hooks import ABSENT
from ksmtrace.stream import Witnessed
from ksmtrace.workload.trial import NotRead, Trial


class Verdict(enum.StrEnum):
    """What was found out about a claim."""

    HOLDS = "holds"
    VIOLATED = "violated"
    UNKNOWN = "unknown"
    NOT_APPLICABLE = "not_applicable"


@dataclass(frozen=True)
class Evidence:
    """One thing that was seen.

    Attributes:
        source: ``events``, ``counters``, ``kernel memory``, ``mapped pages``, ``process`` or
            ``program`` (what the workload itself did and got).
        says: in words, with the values.
        at_ns: CLOCK_MONOTONIC, None where it is of no single moment.
    """

    source: str
    says: str
    at_ns: int | None = None


@dataclass(frozen=True)
class Finding:
    """The judgement of one claim on one case.

    Attributes:
        verdict: the outcome.
        observed: what was observed, in a few words; empty where nothing was.
        evidence: what it rests on; where the verdict is *violated*, what contradicts the claim.
        reason: why the verdict is *unknown* or *not applicable*, else None.
    """

    verdict: Verdict
    observed: str = ""
    evidence: tuple[Evidence, ...] = ()
    reason: str | None = None


def holds(observed: str, *evidence: Evidence) -> Finding:
    """Find that the claim holds."""
    return Finding(Verdict.HOLDS, observed, evidence)


def violated(observed: str, *evidence: Evidence) -> Finding:
    """Find that the claim is violated."""
    return Finding(Verdict.VIOLATED, observed, evidence)


def unknown(reason: str) -> Finding:
    """Find that nothing can be said, and why."""
    return Finding(Verdict.UNKNOWN, reason=reason)


def not_applicable(reason: str) -> Finding:
    """Find that the claim is not about this kernel, and why."""
    return Finding(Verdict.NOT_APPLICABLE, reason=reason)


@dataclass(frozen=True, eq=False)
class Case:
    """What claims are judged on: one stream, and what workloads did meanwhile.

    Attributes:
        recorded: events, counter samples, readings of the witnesses. Of the running kernel as it
            stands it has no events, and every kind is absent.
        trials: by name, what workloads did while it was recorded, and read at each step.
    """

    recorded: Recorded
    trials: Mapping[str, Trial] = field(default_factory=dict)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The kernel's facts as JSON (:class:`ksmtrace.kernel.facts.Facts`)."""
        return self.recorded.header.facts


class Condition(Protocol):
    """Something that must be so for a claim to be judged."""

    def why_not(self, case: Case) -> str | None:
        """Say in words why it is not so; None where it is."""
        ...


@dataclass(frozen=True)
class Kinds:
    """Events of these kinds must have been caught, all of them."""

    names: tuple[str, ...]

    def why_not(self, case: Case) -> str | None:
        """Name the first kind that is absent, only counted, or not complete."""
        recorded = case.recorded
        lost = recorded.lost()
        produced = recorded.losses[-1].produced if recorded.losses else {}
        for name in self.names:
            if recorded.rung(name) == ABSENT:
                return f"{name} was not observed: {_why_absent(recorded, name)}"
            if recorded.only_counted(name):
                return f"{name} was only counted: record with --every-page"
            if lost.get(name):
                return f"{lost[name]} events of {name} were lost"
            missing = produced.get(name, 0) - lost.get(name, 0) - recorded.count(name)
            if recorded.trailer is not None and missing > 0:
                return f"{missing} events of {name} are unaccounted for"
        return None


@dataclass(frozen=True)
class Fields:
    """Events of a kind must have been given these fields on that kernel."""

    kind: str
    names: tuple[str, ...]

    def why_not(self, case: Case) -> str | None:
        """Name the first field that is missing."""
        for name in self.names:
            if not case.recorded.has_field(self.kind, name):
                return f"{self.kind} has no {name} on this kernel"
        return None


@dataclass(frozen=True)
class Samples:
    """So many samples of the kernel's own counters must be there."""

    least: int = 1

    def why_not(self, case: Case) -> str | None:
        """Say how many are there."""
        number = len(case.recorded.settled_samples())
        if number < self.least:
            all_of_them = number == len(case.recorded.samples)
            whole = "" if all_of_them else " before which no event is missing"
            return f"{number} samples of the counters{whole}, and it takes {self.least}"
        return None


@dataclass(frozen=True)
class Counters:
    """Files of /sys/kernel/mm/ksm or lines of /proc/vmstat that must be in the samples."""

    names: tuple[str, ...]

    def why_not(self, case: Case) -> str | None:
        """Name the first that is absent."""
        for sample in case.recorded.samples[-1:]:
            for name in self.names:
                if {**sample.ksm, **sample.vmstat}.get(name) is None:
                    return f"this kernel has no {name}"
        return None


@dataclass(frozen=True)
class Memory:
    """What mm/ksm.c holds must have been read, at least once without ksmd at work."""

    def why_not(self, case: Case) -> str | None:
        """Say why there is no reading that can be used."""
        readings = case.recorded.witnessed
        if any(reading.memory is not None for reading in readings):
            return (
                None if memories_at_rest(case) else "kernel memory was read while KSM was at work"
            )
        reasons = [reading.why_not.get("memory") for reading in readings]
        why = next((reason for reason in reasons if reason), "record with --witnesses")
        return f"kernel memory was not read: {why}"


@dataclass(frozen=True)
class Pages:
    """What mergeable memory maps must have been read."""

    def why_not(self, case: Case) -> str | None:
        """Say why it was not."""
        readings = case.recorded.witnessed
        if any(reading.pages is not None for reading in readings):
            return None
        reasons = [reading.why_not.get("pages") for reading in readings]
        why = next((reason for reason in reasons if reason), "record with --witnesses")
        return f"mapped pages were not read: {why}"


@dataclass(frozen=True)
class Exercised:
    """The trial of this name must have been carried out to its end, with KSM for itself."""

    name: str

    def why_not(self, case: Case) -> str | None:
        """Say why there is nothing to judge."""
        trial = case.trials.get(self.name)
        if trial is None:
            return f"takes the workload {self.name}: ksmtrace selftest"
        if trial.why_not is not None:
            return f"the workload {self.name} was not carried out: {trial.why_not}"
        if trial.others:
            return f"others used KSM during the workload {self.name}: {', '.join(trial.others)}"
        return None


@dataclass(frozen=True)
class File:
    """This kernel has the file of /sys/kernel/mm/ksm, or the line of /proc/vmstat."""

    name: str

    def why_not(self, case: Case) -> str | None:
        """Say that it is absent."""
        known = {**(case.facts.get("ksm") or {}), **(case.facts.get("vmstat") or {})}
        return None if known.get(self.name) is not None else f"this kernel has no {self.name}"


@dataclass(frozen=True)
class StatKey:
    """This kernel prints the key in /proc/PID/ksm_stat."""

    name: str

    def why_not(self, case: Case) -> str | None:
        """Say that it is absent."""
        keys = case.facts.get("ksm_stat") or {}
        return (
            None if keys.get(self.name) else f"this kernel's /proc/PID/ksm_stat has no {self.name}"
        )


@dataclass(frozen=True)
class Claim:
    """One statement about KSM.

    Attributes:
        ids: its numbers in the catalogue, the first of which names it. A statement of the code
            that contradicts a document's has the same number with ``.code`` behind it.
        statement: what is said, in the source's words where they are short.
        source: document, patch, or function in mm/ksm.c.
        check: judges it on a case for which ``applies`` and ``needs`` are met; None where it
            cannot be tested.
        applies: what a kernel must have for the claim to be about it.
        needs: what must have been observed, completely.
        defined: what the code defines, where that is not what the statement says.
        refuted: why the kernel is known to do otherwise than the statement says; a *violated* of
            such a claim is as expected.
        not_testable: why no check is possible.
    """

    ids: tuple[str, ...]
    statement: str
    source: str
    check: Callable[[Case], Finding] | None = None
    applies: tuple[Condition, ...] = ()
    needs: tuple[Condition, ...] = ()
    defined: str | None = None
    refuted: str | None = None
    not_testable: str | None = None

    @property
    def id(self) -> str:
        """The id that names it."""
        return self.ids[0]

    @property
    def trials(self) -> tuple[str, ...]:
        """The workloads that exercise it."""
        return tuple(need.name for need in self.needs if isinstance(need, Exercised))


def judge(claim: Claim, case: Case) -> Finding:
    """Judge one claim on one case."""
    if claim.check is None:
        return not_applicable(f"not testable: {claim.not_testable}")
    for condition in claim.applies:
        if (why := condition.why_not(case)) is not None:
            return not_applicable(why)
    for condition in claim.needs:
        if (why := condition.why_not(case)) is not None:
            return unknown(why)
    try:
        finding = claim.check(case)
    except NotRead as error:
        return unknown(str(error))
    if finding.verdict is Verdict.VIOLATED and (why := _why_unsure(claim, case, finding)):
        return unknown(f"{finding.observed}; but {why}")
    return finding


def _why_unsure(claim: Claim, case: Case, finding: Finding) -> str | None:
    # A program that the kernel left out made no event, and no loss: what holds without it holds.
    kinds = {name for need in claim.needs if isinstance(need, Kinds) for name in need.names}
    by_events = kinds or any(evidence.source == "events" for evidence in finding.evidence)
    if by_events and not len(case.recorded.events):
        return "not one event was recorded: the programs seem not to have run"
    for name in kinds:
        times = case.recorded.left_out(name)
        if times:
            return f"programs that {name} takes were left out {times} times"
    return None


def memories_at_rest(case: Case) -> list[Witnessed]:
    """Return the readings of kernel memory that are true of one moment.

    While ksmd or an unmerge is at work its structures change under the reader, who takes no lock:
    an event meanwhile, or any change between the two ends of the reading, makes it one of those.
    """
    events = case.recorded.events["ts_ns"]
    found = []
    for reading in case.recorded.witnessed:
        if reading.memory is None or not reading.memory.consistent:
            continue
        meanwhile = (events >= reading.begin_ns) & (events <= reading.end_ns)
        if not meanwhile.any():
            found.append(reading)
    return found


def _why_absent(recorded: Recorded, name: str) -> str:
    entry = next((entry for entry in recorded.header.plan if entry["event"] == name), None)
    return entry["reason"] if entry else "the recording is older than this kind of event"
