"""The outcomes: where pages go, and why merges fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ksmtrace.analysis.outcomes import CAUSES
from ksmtrace.units import text_bars, text_share
from ksmtrace.words import PAGE_OUTCOMES, REASONS

from .draw import (
    BAR,
    BOLD,
    GOOD,
    MUTED,
    WARN,
    Line,
    Look,
    bar_rows,
    cell,
    count,
    duration,
    gap,
    gaps,
    line,
    number,
    wrapped,
)
from .graphs import edges_of, graphs, rate_values
from .moment import Shown

if TYPE_CHECKING:
    from ksmtrace.analysis.live import Picture

_MOST_ADVICE = 2
_CAUSE = {cause.name: cause for cause in CAUSES}
_GAPS = ("merge failed", "checksum", "smart scan skipped", "unmerging", "migration")
_GRAPHS = ("attempts", "merged", "failed", "zero_merged", "left_singly", "sharers_removed")


def outcomes(shown: Shown, look: Look) -> list[Line]:
    """Say where pages go: passes, attempts, failures by cause, looks at pages, searches."""
    from ksmtrace.analysis.visits import find_visits

    picture = shown.picture
    if picture is None:
        return wrapped(f"starting: {shown.says}", look.width, BOLD)
    lines = [*_attempts(picture, look), [], *_pages(picture, look), []]
    lines += [*graphs(picture, look, (*_GRAPHS, "unmerges", "migrated"))]
    lines += [*_causes_over_time(picture, look), []]
    lines += [*_visits(find_visits(picture.recorded()), look), []]
    return lines + gaps(picture, _GAPS, look)


def _attempts(picture: Picture, look: Look) -> list[Line]:
    lines: list[Line] = []
    merges = picture.merges
    if merges is None:
        lines.append([("ATTEMPTS TO MERGE", BOLD), ("  not visible on this kernel", MUTED)])
    else:
        share = f" ({text_share(merges.succeeded / merges.attempts)})" if merges.attempts else ""
        lines.append(
            [
                ("ATTEMPTS TO MERGE", BOLD),
                (f"  {merges.attempts:,}: ", ""),
                (f"{merges.succeeded:,} merged{share}", GOOD if merges.succeeded else ""),
                (f", {merges.new_stable_nodes:,} new stable nodes", ""),
            ]
        )
        for reason, failed in merges.failed.items():
            text = REASONS.get(reason, f"failed with {reason}")
            lines += wrapped(f"{failed:,} {text}", look.width, WARN, "  ")
    zero = picture.zero_attempts
    if zero is None:
        lines += [line("  zero pages: not visible on this kernel", MUTED)]
    else:
        lines.append(
            line(f"  zero pages: {zero:,} attempts, {picture.zero_merged or 0:,} replaced")
        )
    return [*lines, *_causes(picture, look)]


def _causes(picture: Picture, look: Look) -> list[Line]:
    causes = picture.causes
    if causes is None or not causes.failures:
        return []
    rung = picture.recorded().rung("merge_failure")
    if rung == "absent":
        return []  # what is not visible is told below
    lines: list[Line] = [
        [],
        [
            ("WHY THEY FAILED", BOLD),
            ("  inferred from what was there afterwards" if rung == "derived" else "", MUTED),
        ],
        line(f"  {'cause':<20}{'failures':>10}{'share':>8}{'seen':>10}{'inferred':>10}", MUTED),
    ]
    total = sum(causes.failures.values())
    ranked = sorted(causes.failures, key=lambda name: -causes.failures[name])
    for name in ranked:
        failures = causes.failures[name]
        lines.append(
            [
                (f"  {name:<20}", BOLD),
                (cell(count(failures, look), 10) + cell(text_share(failures / total), 8), WARN),
                (
                    cell(count(causes.seen[name], look), 10)
                    + cell(count(causes.inferred[name], look), 10),
                    "",
                ),
            ]
        )
    for name in ranked[:_MOST_ADVICE]:
        lines += wrapped(f"{name}: {_CAUSE[name].meaning}", look.width, "", "  ", "    ")
        lines += wrapped(f"what to do: {_CAUSE[name].advice}", look.width, MUTED, "    ")
    return lines


def _causes_over_time(picture: Picture, look: Look) -> list[Line]:
    causes = picture.causes
    if causes is None or len(causes.failures) < 2:
        return []  # the row of all failures says the same
    edges = edges_of(picture, look)
    lines = []
    for name in causes.failures:
        values = rate_values(causes.rates, name, edges)
        if values is not None:
            label = f"   {name[:15]:<16}"
            total = f" {count(causes.failures[name], look)} in all"
            lines.append([(label, MUTED), (text_bars(values), BAR), (total, "")])
    return lines


def _pages(picture: Picture, look: Look) -> list[Line]:
    heading: Line = [("WHERE PAGES GO", BOLD)]
    pages = picture.pages
    if pages is None:
        return [[*heading, ("  not visible", MUTED)], *gap(picture, "page_outcomes", look),
                *_counted(picture, look)]  # fmt: skip
    total = sum(pages.total.values())
    heading.append((f"  ksmd came by {count(total, look)} pages so far", ""))
    passes = [*reversed(pages.passes)][:2]
    seen = picture.passes.last if picture.passes else ()
    runs = bool(seen) and seen[-1].end_ns is None
    heads = (["this pass", "last pass"] if runs else ["last pass", "before"])[: len(passes)]
    titles = "".join(f"{title:>12}" for title in (*heads, "so far", "share"))
    lines = [heading]
    if total:
        lines.append(line(f"  {'':<18}{titles}", MUTED))
    for name in sorted(pages.total, key=lambda name: -pages.total[name]):
        short, meaning = PAGE_OUTCOMES[name]
        of_passes = "".join(cell(count(of.get(name, 0), look), 12) for _, of in passes)
        so_far, share = count(pages.total[name], look), text_share(pages.total[name] / total)
        lines.append(
            [
                (f"  {short:<18}", WARN if name == "failed" else BOLD),
                (of_passes, ""),
                (cell(so_far, 12) + cell(share, 12), ""),
                (f"  {meaning}" if look.width >= 120 else "", MUTED),
            ]
        )
    return lines


def _counted(picture: Picture, look: Look) -> list[Line]:
    # What the counters tell all the same.
    first, last = picture.first_sample, picture.sample
    said = []
    for name, word in (("pages_scanned", "scanned"), ("pages_skipped", "skipped by smart_scan")):
        then, now = number(first, name), number(last, name)
        if then is not None and now is not None:
            said.append(f"{count(now - then, look)} {word}")
    return [line(f"  by the kernel's counters: {', '.join(said)}")] if said else []


def _visits(visits: Any, look: Look) -> list[Line]:
    if visits is None:
        return [[("PAGE BY PAGE", BOLD), ("  not visible on this kernel", MUTED)]]
    rung = visits.rungs["cmp_and_merge_page"]
    lines: list[Line] = [
        [
            ("PAGE BY PAGE", BOLD),
            (f"  ksmd looked at {count(visits.pages, look)} pages", ""),
            (f" ({rung})" if rung else "", MUTED),
        ]
    ]
    if visits.smart_scan_skips is not None:
        lines.append(line(f"  {count(visits.smart_scan_skips, look)} more skipped by smart_scan"))
    if visits.searches is None:
        lines.append(line("  searches of the stable tree: not visible on this kernel", MUTED))
    else:
        found = ", ".join(
            f"{name.replace('_', ' ')} {count(n, look)}" for name, n in visits.searches.items()
        )
        lines.append(line(f"  searches of the stable tree: {found}"))
    for label, histogram, write in (
        ("between two looks", visits.interval_ns, duration),
        ("nodes per search", visits.search_nodes, count),
    ):
        if histogram is not None:
            lines += [[(f"  {label}", MUTED)], *bar_rows(histogram.slots, write, look)]
    return lines
