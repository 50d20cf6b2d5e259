"""The generated documents: the table of claims, and the matrix of verdicts per kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ksmtrace.claims import (
    accounts,
    invariants,
    knobs,
    memory,
    migration,
    statistics,
    swap,
    trees,
    unmerge,
)
from ksmtrace.claims.claim import Claim
from ksmtrace.claims.guide import GUIDE
from ksmtrace.claims.table import CLAIMS

_TOPICS: tuple[tuple[str, tuple[Claim, ...]], ...] = (
    ("Statistics", statistics.CLAIMS),
    ("Knobs, ksmd's life, madvise", knobs.CLAIMS),
    ("Trees and merging", trees.CLAIMS),
    ("Unmerging, copy on write, exit", unmerge.CLAIMS),
    ("Migration", migration.CLAIMS),
    ("Swap", swap.CLAIMS),
    ("Every event", invariants.CLAIMS),
    ("Counters beside events and each other", accounts.CLAIMS),
    ("Kernel memory and mapped pages", memory.CLAIMS),
)
_GENERATED = "Generated from `ksmtrace/claims/` by `scripts/generate`: do not edit."
_MARKS = {
    "holds": "holds",
    "violated": "**VIOLATED**",
    "refuted": "refuted",
    "unknown": "unknown",
    "not_applicable": "n/a",
}


def claims_markdown() -> str:
    """Return the text of ``docs/claims.md``."""
    lines = [
        "# Claims",
        "",
        _GENERATED,
        "",
        f"{len(CLAIMS)} claims. `ksmtrace check --claim ID` judges one, `ksmtrace selftest` all "
        "with the workloads they take. *Code* is what the code defines, where that is not what is "
        "said; *known* why the kernel does otherwise than the statement: such a claim is refuted, "
        "which is no fault. Ids: C, D, R, W as in the catalogue, DOC of the admin guide against "
        "the code, Q at rest, I while scanning; `.code` is what the code defines instead.",
    ]
    for title, claims in _TOPICS:
        lines += [
            "",
            f"## {title}",
            "",
            "| id | said | code, known | source | workload |",
            "|---|---|---|---|---|",
            *(_claim_row(claim) for claim in claims if claim.check is not None),
        ]
        untestable = [claim for claim in claims if claim.check is None]
        if untestable:
            lines += ["", "Not testable:", ""]
            lines += [
                f"- {', '.join(claim.ids)}: {claim.statement} ({claim.source}). Because: "
                f"{claim.not_testable}."
                for claim in untestable
            ]
    return "\n".join([*lines, *_guide_lines()]) + "\n"


def _guide_lines() -> list[str]:
    known = {known: claim.id for claim in CLAIMS for known in claim.ids}
    sentences = [sentence for _, section in GUIDE for sentence in section]
    judged = sum(bool(sentence.claims) for sentence in sentences)
    lines = [
        "",
        "## The admin guide, sentence by sentence",
        "",
        f"Documentation/admin-guide/mm/ksm.rst of 6.12 (7.3 has the same text): {len(sentences)} "
        f"sentences, {judged} with claims. *Since*: the first of 5.10, 6.1 and 6.12 that has it.",
    ]
    for title, section in GUIDE:
        lines += ["", f"### {title}", "", "| sentence | since | judged by |", "|---|---|---|"]
        lines += [
            f"| {sentence.begins.replace('|', '/')} ... | {sentence.since or '5.10'} | "
            + (
                ", ".join(dict.fromkeys(known[one] for one in sentence.claims))
                or f"not testable, because: {sentence.why_not}"
            )
            + " |"
            for sentence in section
        ]
    return lines


def _claim_row(claim: Claim) -> str:
    code = "; ".join(
        part
        for part in (
            claim.defined,
            f"*known*: {claim.refuted}" if claim.refuted else None,
        )
        if part
    )
    cells = (
        ", ".join(claim.ids),
        claim.statement,
        code or "–",
        claim.source,
        ", ".join(claim.trials) or "–",
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def reduced(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of a kernel's outcome (:func:`ksmtrace.claims.judgement.as_json`) what is published."""
    return {
        "release": outcome["kernel"]["release"],
        "claims": {
            claim["id"]: {
                "verdict": "refuted" if claim["expected"] else claim["verdict"],
                "observed": claim["observed"],
                "reason": claim["reason"],
            }
            for claim in outcome["claims"]
        },
    }


def matrix_markdown(
    results: Mapping[str, Mapping[str, Any]], notes: Sequence[Mapping[str, str]]
) -> str:
    """Return the text of ``docs/matrix.md``.

    Args:
        results: by kernel what :func:`reduced` returned.
        notes: explanations of verdicts, each with ``claims``, ``kernels``, ``explanation`` and
            ``reproduced``.
    """
    testable = [claim for claim in CLAIMS if claim.check is not None]
    lines = [
        "# Claims per kernel",
        "",
        _GENERATED.replace("`ksmtrace/claims/`", "`ksmtrace/claims/` and `docs/results/`"),
        "",
        "Each column is one real run of `ksmtrace selftest` (`scripts/make_results`). *refuted*: "
        "the kernel does otherwise than is said, and that is known ([claims.md](claims.md)); "
        "*unknown*: it could not be observed, see below; *n/a*: not about this kernel.",
        "",
        f"| claim | {' | '.join(results)} |",
        f"|---|{'---|' * len(results)}",
        f"| kernel | {' | '.join(result['release'] for result in results.values())} |",
        *(_matrix_row(claim, results) for claim in testable),
        "",
        "## What was observed where a claim is refuted or violated",
        "",
    ]
    for claim in testable:
        seen = [
            f"{kernel}: {verdict['observed']}"
            for kernel, result in results.items()
            if (verdict := result["claims"].get(claim.id, {})).get("verdict")
            in ("refuted", "violated")
        ]
        if seen:
            lines.append(f"- **{claim.id}** {claim.statement}. {_joined(seen)}")
    lines += ["", "## Why unknown", ""]
    reasons: dict[str, dict[str, list[str]]] = {}
    for kernel, result in results.items():
        for claim_id, verdict in result["claims"].items():
            if verdict["verdict"] == "unknown":
                reasons.setdefault(verdict["reason"], {}).setdefault(kernel, []).append(claim_id)
    for reason, where in reasons.items():
        named = "; ".join(f"{kernel}: {', '.join(ids)}" for kernel, ids in where.items())
        lines.append(f"- {reason} ({named})")
    lines += ["", "## Explained, and reproduced by hand", ""]
    lines += [
        f"- **{note['claims']}** ({note['kernels']}): {note['explanation']} Reproduced: "
        f"{note['reproduced']}"
        for note in notes
    ]
    return "\n".join(lines) + "\n"


def _matrix_row(claim: Claim, results: Mapping[str, Mapping[str, Any]]) -> str:
    cells = [
        _MARKS[result["claims"].get(claim.id, {"verdict": "unknown"})["verdict"]]
        for result in results.values()
    ]
    return f"| {claim.id} | {' | '.join(cells)} |"


def _joined(seen: Sequence[str]) -> str:
    # Kernels that show the same are named together.
    by_text: dict[str, list[str]] = {}
    for entry in seen:
        kernel, _, text = entry.partition(": ")
        by_text.setdefault(text, []).append(kernel)
    return "; ".join(f"{', '.join(kernels)}: {text}" for text, kernels in by_text.items())
