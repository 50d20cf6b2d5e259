"""All claims judged on one case, and the outcome as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ksmtrace.claims.claim import Case, Claim, Finding, Verdict, judge


@dataclass(frozen=True)
class Judgement:
    """One claim and what was found about it."""

    claim: Claim
    finding: Finding

    @property
    def is_fault(self) -> bool:
        """Whether the claim is violated, and not known to be."""
        return self.finding.verdict is Verdict.VIOLATED and self.claim.refuted is None

    @property
    def word(self) -> str:
        """The verdict for people: ``refuted`` where it is violated and known to be."""
        refuted = self.finding.verdict is Verdict.VIOLATED and not self.is_fault
        return "refuted" if refuted else self.finding.verdict.value


def judge_all(claims: Iterable[Claim], case: Case) -> list[Judgement]:
    """Judge claims on one case, in their order."""
    return [Judgement(claim, judge(claim, case)) for claim in claims]


def as_json(judgements: Sequence[Judgement], case: Case) -> dict[str, Any]:
    """Return the outcome as plain JSON types; times count from the recording's begin."""
    begin_ns = case.recorded.header.started_ns
    return {
        "kernel": case.facts.get("kernel"),
        "complete": not case.recorded.why_incomplete(),
        "incomplete": case.recorded.why_incomplete(),
        "counts": count_verdicts(judgements),
        "claims": [_claim_json(judgement, begin_ns) for judgement in judgements],
    }


def _claim_json(judgement: Judgement, begin_ns: int) -> dict[str, Any]:
    claim, finding = judgement.claim, judgement.finding
    return {
        "id": claim.id,
        "ids": list(claim.ids),
        "statement": claim.statement,
        "source": claim.source,
        "defined": claim.defined,
        "observed": finding.observed or None,
        "verdict": finding.verdict.value,
        "expected": claim.refuted if finding.verdict is Verdict.VIOLATED else None,
        "evidence": [
            {
                "source": evidence.source,
                "says": evidence.says,
                "at_ns": None if evidence.at_ns is None else evidence.at_ns - begin_ns,
            }
            for evidence in finding.evidence
        ],
        "reason": finding.reason,
    }


def count_verdicts(judgements: Sequence[Judgement]) -> dict[str, int]:
    """Count the claims per verdict; those known to be violated apart, as ``refuted``."""
    counts = {verdict.value: 0 for verdict in Verdict}
    counts["refuted"] = 0
    for judgement in judgements:
        counts[judgement.word] += 1
    return counts


def nr_faults(claims: Iterable[Mapping[str, Any]]) -> int:
    """Count, in the JSON form, the claims that are violated and not known to be."""
    return sum(claim["verdict"] == "violated" and claim["expected"] is None for claim in claims)
