"""Checks on what trials read: small pieces that the topics put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.races import find_races
from ksmtrace.claims.claim import Case, Evidence, Finding, Kinds, Verdict, holds, unknown, violated
from ksmtrace.events import Events, of_kind
from ksmtrace.workload.trial import Reading, Trial

SHOWN = 5
"""How many events of a kind are shown as evidence."""

JOINS = Kinds(("stable_tree_append", "remove_rmap_item_from_tree", "remove_node_from_stable_tree"))
"""All events of sharers that join and leave stable_nodes."""

Check = Callable[[Case], Finding]


def counter(reading: Reading, *names: str) -> Evidence:
    """Make evidence of counters at a step."""
    values = ", ".join(f"{name} {reading.counters.get(name)}" for name in names)
    return Evidence("counters", f"{reading.label}: {values}", reading.begin_ns)


def frames(reading: Reading) -> Evidence:
    """Make evidence of what is mapped at a step."""
    return Evidence(
        "mapped pages",
        f"{reading.label}: {reading.places} pages in {reading.frames} frames",
        reading.begin_ns,
    )


def program(reading: Reading, *names: str) -> Evidence:
    """Make evidence of what the workload itself got at a step."""
    values = ", ".join(f"{name} {reading.notes.get(name)}" for name in names)
    return Evidence("program", f"{reading.label}: {values}", reading.begin_ns)


def tell(so: bool, observed: str, *evidence: Evidence) -> Finding:
    """Find that the claim holds, or is violated, by one thing that was observed."""
    return holds(observed, *evidence) if so else violated(observed, *evidence)


def changed(name: str, label: str, **expected: int) -> Check:
    """Check that counters have changed by so much until a step of a trial.

    Args:
        name: the trial's.
        label: the step.
        expected: by counter its change since the trial's begin; one that this kernel does not
            have is not judged.
    """

    def check(case: Case) -> Finding:
        trial = case.trials[name]
        return judge_changes(trial, label, expected)

    return check


def judge_changes(
    trial: Trial, label: str, expected: Mapping[str, int], since: str | None = None
) -> Finding:
    """Judge whether counters have changed by so much; see :func:`changed`."""
    begin = trial.readings[0] if since is None else trial.at(since)
    end = trial.at(label)
    known = [n for n in expected if end.counters.get(n) is not None]
    if not known:
        return unknown(f"this kernel has no {' or '.join(expected)}")
    changes = {n: trial.change(label, n, since) for n in known}
    observed = ", ".join(f"{n} {changes[n]:+d}" for n in known)
    evidence = (counter(begin, *known), counter(end, *known))
    if any(changes[n] != expected[n] for n in known):
        wanted = ", ".join(f"{n} {expected[n]:+d}" for n in known)
        return violated(observed, Evidence("program", f"{label}: due {wanted}"), *evidence)
    return holds(observed, *evidence)


def judge_steps(trial: Trial, steps: Mapping[str, Mapping[str, int]], observed: str) -> Finding:
    """Judge what counters have changed by until each of several steps.

    Args:
        trial: the trial.
        steps: by step what is due, as for :func:`changed`.
        observed: what was observed where all of it is so.
    """
    evidence: list[Evidence] = []
    for label, expected in steps.items():
        finding = judge_changes(trial, label, expected)
        if finding.verdict is not Verdict.HOLDS:
            return finding
        evidence += finding.evidence
    return holds(observed, *evidence)


def both(*checks: Check) -> Check:
    """Check several things: violated if one is, then unknown if one is, else all hold."""

    def check(case: Case) -> Finding:
        found = [part(case) for part in checks]
        for verdict in ("violated", "unknown", "not_applicable"):
            for finding in found:
                if finding.verdict.value == verdict:
                    return finding
        evidence = tuple(one for finding in found for one in finding.evidence)
        return holds("; ".join(finding.observed for finding in found), *evidence)

    return check


def noted(name: str, label: str, note: str, expected: object, says: str) -> Check:
    """Check what a trial's program got at a step."""

    def check(case: Case) -> Finding:
        reading = case.trials[name].at(label)
        if note not in reading.notes:
            return unknown(f"the workload {name} did not read {note}: it is older than the claim")
        got = reading.notes[note]
        evidence = program(reading, note)
        so = got == expected
        due = "" if so else f", and {expected} was due"
        return tell(so, f"{says}: {got}{due}", evidence)

    return check


def race(race_id: str, exposed: str, exposure: Callable[[Case], int]) -> Check:
    """Check that a race of :data:`ksmtrace.analysis.races.RACES` was not seen.

    Args:
        race_id: R1 to R25.
        exposed: what it can happen to, in words.
        exposure: how many of these there were; without any, nothing was shown.
    """

    def check(case: Case) -> Finding:
        verdict = next(one for one in find_races(case.recorded) if one.id == race_id)
        if verdict.times is None:
            return unknown(verdict.why_not or "it cannot be seen here")
        evidence = tuple(Evidence("events", says) for says in verdict.evidence)
        if verdict.times:
            return violated(f"seen {verdict.times} times", *evidence)
        number = exposure(case)
        if not number:
            return unknown(f"no {exposed}")
        return holds(f"not once, with {number} {exposed}", *evidence)

    return check


def during(case: Case, name: str, kind: str, since: str | None = None) -> Events:
    """Select the events of a kind that happened during a trial, or since one of its steps."""
    trial = case.trials[name]
    begin_ns = trial.begin_ns if since is None else trial.at(since).end_ns
    events = of_kind(case.recorded.events, kind)
    return events[(events["ts_ns"] > begin_ns) & (events["ts_ns"] < trial.end_ns)]


def show(
    events: Events, wrong: npt.NDArray[np.bool_] | npt.NDArray[np.int64], says: str
) -> tuple[Evidence, ...]:
    """Make evidence of the first wrong events, and of how many there are.

    Args:
        events: shape (n,).
        wrong: which of them, as a mask or places.
        says: a format with the names of event fields, integers.
    """
    chosen = events[wrong]
    names = [name for name in events.dtype.names or () if f"{{{name}" in says]
    shown = [
        Evidence(
            "events",
            says.format(**{name: int(event[name]) for name in names}),
            int(event["ts_ns"]),
        )
        for event in chosen[:SHOWN]
    ]
    if len(chosen) > SHOWN:
        shown.append(Evidence("events", f"and {len(chosen) - SHOWN} more of that kind"))
    return tuple(shown)
