"""Judgements as KTAP, version 1 (Documentation/dev-tools/ktap.rst), for kselftest and kunit.py.

A claim that holds, or is refuted as known, is ok; one that is violated is not ok; one that is
unknown or not applicable is skipped, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

VERSION_LINE = "KTAP version 1"
_INDENT = "    "


def check_lines(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Write one subtest per kernel, in it one test per claim.

    Args:
        outcomes: per kernel what :func:`ksmtrace.claims.judgement.as_json` returned; one with a
            ``skipped`` instead of claims could not be judged at all; one with a ``failed`` was not
            tested to the end, and has what was judged until then, if anything.
    """
    yield VERSION_LINE
    yield f"1..{len(outcomes)}"
    for number, outcome in enumerate(outcomes, 1):
        name = f"ksm_claims_{_word((outcome.get('kernel') or {}).get('release') or 'unknown')}"
        if outcome.get("skipped"):
            yield f"ok {number} {name} # SKIP {_one_line(outcome['skipped'])}"
            continue
        claims = outcome.get("claims", ())
        if claims:
            yield f"{_INDENT}{VERSION_LINE}"
            yield f"{_INDENT}1..{len(claims)}"
            for line in _claim_lines(claims):
                yield f"{_INDENT}{line}"
        if outcome.get("failed"):
            yield f"# {name}: {_one_line(outcome['failed'])}"
            yield f"not ok {number} {name}"
            continue
        failed = any(c["verdict"] == "violated" and c["expected"] is None for c in claims)
        judged = any(c["verdict"] in ("holds", "violated") for c in claims)
        skip = "" if judged else " # SKIP no claim could be judged"
        yield f"{'not ok' if failed else 'ok'} {number} {name}{skip}"


def skip_all_line(reason: str) -> Iterator[str]:
    """Write a plan without tests: skipped as a whole."""
    yield VERSION_LINE
    yield f"1..0 # SKIP {_one_line(reason)}"


def _claim_lines(claims: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for number, claim in enumerate(claims, 1):
        name = _word(claim["id"])
        verdict = claim["verdict"]
        if verdict in ("unknown", "not_applicable"):
            reason = f"{verdict.replace('_', ' ')}: {claim['reason']}"
            yield f"ok {number} {name} # SKIP {_one_line(reason)}"
            continue
        if verdict == "violated":
            yield f"# {name}: {_one_line(claim['statement'])}"
            yield f"# {name}: observed: {_one_line(claim['observed'] or '')}"
            for evidence in claim["evidence"]:
                yield f"# {name}: {evidence['source']}: {_one_line(evidence['says'])}"
        if claim["expected"] is not None:
            known = _one_line(claim["expected"])
            yield f"ok {number} {name} # XFAIL refuted as known: {known}"
        else:
            yield f"{'ok' if verdict == 'holds' else 'not ok'} {number} {name}"


def _word(text: str) -> str:
    # A test's name is a word: `#` would begin a directive.
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)


def _one_line(text: str) -> str:
    return " ".join(text.replace("#", "number ").split())
