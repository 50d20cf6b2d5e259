"""The claims as they were judged, and the books of the counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .draw import (
    BAD,
    BOLD,
    GOOD,
    MUTED,
    WARN,
    Line,
    Look,
    line,
    wrapped,
)
from .moment import Shown
from .tables import (
    Column,
    Row,
    Table,
    View,
    arranged,
    exactly,
    word,
)

if TYPE_CHECKING:
    pass


def _signed(value: Any, look: Look) -> str:
    return "–" if value is None else f"{value:+,}" if value else "0"


CLAIM_COLUMNS = (
    Column("verdict", "verdict", word, right=False, meaning="what was found out"),
    Column("id", "claim", word, right=False, meaning="its number in the catalogue"),
    Column("statement", "statement", word, right=False, meaning="what is said"),
    Column("found", "found", word, right=False, meaning="what was observed, or why not"),
)
BOOK_COLUMNS = (
    Column("counter", "counter", word, right=False, meaning="a counter of the kernel"),
    Column("first", "first", exactly, meaning="at the first sample"),
    Column("last", "last", exactly, meaning="at the last one"),
    Column("delta", "change", _signed, meaning="last less first"),
    Column("events_say", "events say", _signed, meaning="what it should be"),
    Column("difference", "difference", _signed, meaning="change less that"),
    Column("verdict", "verdict", word, right=False, meaning="what to make of it"),
    Column("why", "why", word, right=False, meaning="the rule"),
)
CLAIM_VIEWS = ("claims", "books")
_VERDICT_STYLE = {
    **{"violated": BAD, "contradiction": BAD, "refuted": WARN},
    **{"holds": GOOD, "exact": GOOD},
}
_VERDICT_ORDER = ("violated", "refuted", "holds", "unknown", "not_applicable")


def claims(shown: Shown, view: View) -> Table:
    """List the invariants as judged last, or the counters' books."""
    if view.by == "books":
        return _books(shown, view)
    judged = shown.judged
    if judged is None:
        return Table(CLAIM_COLUMNS, empty="judging ...")
    if judged.why_not:
        return Table(CLAIM_COLUMNS, empty=judged.why_not)
    rows = []
    for one in judged.judgements:
        finding = one.finding
        rows.append(
            Row(
                one.claim.id,
                {
                    "verdict": one.word,
                    "id": one.claim.id,
                    "statement": one.claim.statement,
                    "found": finding.observed or finding.reason,
                },
                _VERDICT_STYLE.get(one.word, MUTED),
            )
        )
    rows.sort(key=lambda row: _VERDICT_ORDER.index(str(row.values["verdict"])))
    return arranged(CLAIM_COLUMNS, rows, view, "no claim")


def claims_heading(shown: Shown, view: View, look: Look) -> list[Line]:
    """Say what the claims were judged on."""
    if view.by == "books":
        return [line("the kernel's counters beside what the events say they should be", MUTED)]
    judged = shown.judged
    if judged is None or judged.why_not:
        return [line("")]
    counts = {verdict: 0 for verdict in _VERDICT_ORDER}
    for one in judged.judgements:
        counts[one.word] += 1
    said = ", ".join(f"{n} {verdict.replace('_', ' ')}" for verdict, n in counts.items() if n)
    return [[(said, BOLD), (f"  judged on {judged.of}", MUTED)]]


def claim_detail(shown: Shown, key: str, look: Look) -> list[Line]:
    """Say what a claim is, and what it was judged on."""
    judged = shown.judged
    one = next((one for one in judged.judgements if one.claim.id == key), None) if judged else None
    if one is None:
        return [line("not judged", MUTED)]
    finding = one.finding
    lines: list[Line] = [
        *wrapped(one.claim.statement, look.width, BOLD),
        [("source ", MUTED), (one.claim.source, "")],
        [],
        [("verdict ", MUTED), (one.word, _VERDICT_STYLE.get(one.word, BOLD))],
    ]
    if finding.observed:
        lines += wrapped(finding.observed, look.width)
    if finding.reason:
        lines += wrapped(finding.reason, look.width, WARN)
    if one.claim.defined:
        lines += [[], *wrapped(f"the code: {one.claim.defined}", look.width)]
    if one.claim.refuted:
        lines += [[], *wrapped(f"known to be otherwise: {one.claim.refuted}", look.width, WARN)]
    lines += [[], [("EVIDENCE", BOLD)]]
    for evidence in finding.evidence:
        lines += wrapped(f"{evidence.source}: {evidence.says}", look.width, "", "  ")
    if not finding.evidence:
        lines.append(line("  none", MUTED))
    return lines


def _books(shown: Shown, view: View) -> Table:
    picture = shown.picture
    if picture is None or not picture.books:
        return Table(BOOK_COLUMNS, empty="no two samples of the counters yet")
    rows = [
        Row(
            entry.counter,
            {
                "counter": entry.counter,
                "first": entry.first,
                "last": entry.last,
                "delta": entry.delta,
                "events_say": entry.events_say,
                "difference": entry.difference,
                "verdict": entry.verdict,
                "why": entry.why,
            },
            _VERDICT_STYLE.get(entry.verdict, "" if entry.events_say is not None else MUTED),
        )
        for entry in picture.books
        if entry.first is not None
    ]
    return arranged(BOOK_COLUMNS, rows, view, "no counter")


def book_detail(shown: Shown, key: str, look: Look) -> list[Line]:
    """Say all about one counter."""
    from ksmtrace.kernel.sysfs import FILE_BY_NAME

    entries = shown.picture.books if shown.picture else ()
    entry = next((entry for entry in entries if entry.counter == key), None)
    if entry is None:
        return [line("no such counter", MUTED)]
    lines: list[Line] = [line(entry.counter, BOLD)]
    file = FILE_BY_NAME.get(entry.counter)
    if file is not None:
        lines += wrapped(f"{file.meaning} ({file.source})", look.width, MUTED)
    lines.append([])
    for name in ("first", "last", "delta", "events_say", "difference", "verdict"):
        value = getattr(entry, name)
        text = f"{value:,}" if isinstance(value, int) else str("–" if value is None else value)
        lines.append([(f"  {name:<14}", MUTED), (text, BOLD)])
    return [*lines, [], *wrapped(entry.why, look.width)]
