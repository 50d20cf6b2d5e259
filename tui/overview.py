"""The overview: is KSM paying, and what asks for attention?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ksmtrace.units import text_bytes, text_duration

from .draw import (
    ABSENT,
    BAD,
    BOLD,
    GOOD,
    MUTED,
    WARN,
    Line,
    Look,
    beside,
    cell,
    count,
    duration,
    line,
    named,
    number,
    page_bytes,
    rate,
    size,
    wrapped,
)
from .graphs import graphs, last_rate
from .moment import Phase, Shown

if TYPE_CHECKING:
    from ksmtrace.analysis.live import Picture
    from ksmtrace.stream import CounterSample

_STALE_INTERVALS = 3
_MOST_FAULTS = 3
_SAME_NS = 5_000_000_000
_LEAST_GAP = 64  # pages
_GAP_SHARE = 0.1
_LEAST_ATTEMPTS = 100
_BAD_SUCCESS_RATE = 0.5
_LONG_PASS_NS = 600_000_000_000


# ---- alarms ----


def alarms(shown: Shown) -> list[tuple[str, str]]:
    """List what asks for attention, as (style, text), the most pressing first."""
    found: list[tuple[str, str]] = []
    if shown.phase is Phase.FAILED:
        found.append((BAD, f"ended: {shown.says}; what is shown is from before"))
    elif shown.phase is Phase.ENDED and shown.says:
        found.append((WARN, shown.says))
    if shown.recorder is not None and shown.recorder.says:
        recorder = shown.recorder
        kept = f" ({recorder.nr_events:,} events)" if recorder.nr_events else ""
        style = GOOD if recorder.says == "recorded" else BAD
        found.append((style, f"{recorder.says}: {recorder.path}{kept}"))
    picture = shown.picture
    if picture is None:
        return found
    if picture.nr_lost:
        losses = picture.losses
        assert losses is not None
        kinds = ", ".join(f"{n:,} {name}" for name, n in losses.dropped.items() if n)
        found.append((BAD, f"events found the ring full and are lost: {kinds}"))
    if picture.skipped:
        found.append(
            (
                WARN,
                f"{picture.skipped:,} events came too fast to be drawn: trees, tables and books "
                "lack them; the counters, and a recording, do not",
            )
        )
    if picture.losses is not None:
        for target, times in picture.losses.missed.items():
            found.append((WARN, f"the kernel left out the program on {target} {times:,} times"))
    found += _claim_alarms(shown)
    found += _book_alarms(picture)
    if picture.trailer is not None:
        found += [(WARN, notice) for notice in picture.trailer.notices]
    return found + _sample_alarms(shown, picture)


def _claim_alarms(shown: Shown) -> list[tuple[str, str]]:
    judged = shown.judged
    faults = [one for one in judged.judgements if one.is_fault] if judged else []
    found = [
        (BAD, f"{one.claim.id} is violated: {one.finding.observed} (6 shows the evidence)")
        for one in faults[:_MOST_FAULTS]
    ]
    if len(faults) > _MOST_FAULTS:
        found.append((BAD, f"{len(faults) - _MOST_FAULTS} more claims are violated"))
    return found


def _book_alarms(picture: Picture) -> list[tuple[str, str]]:
    return [
        (
            BAD,
            f"{entry.counter} moved by {entry.delta:,}, but the events say {entry.events_say:,}: a "
            "fault of the kernel, or of ksmtrace",
        )
        for entry in picture.books
        if entry.verdict == "contradiction"
    ]


def _sample_alarms(shown: Shown, picture: Picture) -> list[tuple[str, str]]:
    sample = shown.sample
    if sample is None:
        return [(WARN, "the kernel's counters have not been sampled")]
    found = []
    interval_ns = int(picture.header.settings.get("interval_ns") or 1_000_000_000)
    age_ns = picture.at_ns - sample.end_ns
    if shown.phase is Phase.LIVE and age_ns > _STALE_INTERVALS * interval_ns:
        found.append((WARN, f"the counters are {text_duration(age_ns)} old: sampling is behind"))
    run = number(sample, "run")
    if run == 0:
        found.append((WARN, "ksmd is stopped (run is 0): nothing merges"))
    elif run == 2:
        found.append((WARN, "everything was unmerged (run is 2)"))
    found += _truth_alarms(shown, picture, sample)
    profit = number(sample, "general_profit")
    if profit is not None and profit < 0:
        found.append(
            (BAD, f"KSM costs {text_bytes(-profit)} more than it saves: rmap_items outweigh merges")
        )
    merges = picture.merges
    if merges is not None and merges.attempts >= _LEAST_ATTEMPTS:
        share = merges.succeeded / merges.attempts
        if share < _BAD_SUCCESS_RATE:
            found.append(
                (WARN, f"only {share:.0%} of {merges.attempts:,} attempts to merge succeed")
            )
    if picture.passes is not None and (picture.passes.median_ns or 0) > _LONG_PASS_NS:
        found.append(
            (
                WARN,
                f"a pass takes {text_duration(picture.passes.median_ns or 0)}: raise "
                "pages_to_scan, or set advisor_mode to scan-time",
            )
        )
    return found


def _truth_alarms(shown: Shown, picture: Picture, sample: CounterSample) -> list[tuple[str, str]]:
    read, counted = _page_truth(shown), number(sample, "pages_sharing")
    if read is None or counted is None or (shown.savings and not shown.savings.trusted):
        return []
    pages, at_ns = read
    # While KSM is at work the two are of two moments.
    old = abs(sample.begin_ns - at_ns) > _SAME_NS
    if old or counted - pages <= max(_LEAST_GAP, counted * _GAP_SHARE):
        return []
    each = page_bytes(picture)
    return [
        (
            WARN,
            f"the counters say that {text_bytes(counted * each)} is saved, what is mapped "
            f"{text_bytes(pages * each)}: pages of memory that is gone count until ksmd comes by",
        )
    ]


def alarm_lines(shown: Shown, look: Look) -> list[Line]:
    """Write the alarms, or that there are none."""
    found = alarms(shown)
    if not found:
        return [[("✓ ", GOOD), ("nothing asks for attention", MUTED)]]
    lines = []
    for style, text in found:
        sign = "✓ " if style == GOOD else "! "
        lines += wrapped(text, look.width, style, sign)
    return lines


# ---- the screen ----


def overview(shown: Shown, look: Look) -> list[Line]:
    """Answer: is KSM paying, and what is it doing?"""
    picture = shown.picture
    sample = shown.sample
    if picture is None:
        lines = wrapped(f"starting: {shown.says}", look.width, BOLD)
    else:
        lines = alarm_lines(shown, look)
    lines.append([])
    lines += beside(paying(shown, sample, look), [*passes(picture, sample, look)], look.width)
    if picture is not None:
        lines.append([])
        lines += graphs(picture, look, OVERVIEW_GRAPHS)
    lines.append([])
    lines += beside(trees(picture, sample, look), knobs(sample, look), look.width)
    return lines


def paying(shown: Shown, sample: CounterSample | None, look: Look) -> list[Line]:
    """Say what KSM saves and what it costs."""
    picture = shown.picture
    if sample is None:
        return [line("IS KSM PAYING?", BOLD), line("  unknown: no sample of the counters", MUTED)]
    sharing, zero = number(sample, "pages_sharing"), number(sample, "ksm_zero_pages")
    profit = number(sample, "general_profit")
    saved = None if sharing is None else (sharing + (zero or 0)) * page_bytes(picture)
    if profit is None:
        verdict = ("  unknown", MUTED)
    elif profit > 0:
        verdict = ("  yes", f"bold {GOOD}")
    elif profit < 0:
        verdict = ("  no", f"bold {BAD}")
    else:
        verdict = ("  nothing is saved", MUTED)
    lines: list[Line] = [
        [("IS KSM PAYING?", BOLD), verdict],
        named("saved", size(saved, look), "counters"),
        _truth(shown, look),
        named("general_profit", size(profit, look)),
    ]
    points = picture.points if picture else ()
    cow = sample.vmstat.get("cow_ksm")
    first = picture.first_sample.vmstat.get("cow_ksm") if picture and picture.first_sample else None
    if cow is None or first is not None:
        copied = None if cow is None or first is None else cow - first
        lines.append(named("copied on write", count(copied, look), "so far"))
    else:
        lines.append(named("copied on write", "–"))
    cpu = last_rate(points, lambda point: point.cpu_ns)
    lines.append(named("ksmd", "–" if cpu is None else f"{cpu / 1e9:.1%} of a CPU"))
    lines.append(named("yield", *_yield(picture, look)))
    return lines


def _truth(shown: Shown, look: Look) -> Line:
    savings, picture, sample = shown.savings, shown.picture, shown.sample
    label = "by page truth"
    if savings is not None and savings.why_not:
        return named(label, "unknown", savings.why_not, MUTED)
    read = _page_truth(shown)
    if read is not None:
        pages, at_ns = read
        # What is mapped does not tell the zero pages that KSM has placed from others.
        label = "truth, no zeros" if number(sample, "ksm_zero_pages") else label
        unsure = " at most" if savings is not None and not savings.trusted else ""
        age = "" if picture is None else f"{max(picture.at_ns - at_ns, 0) / 1e9:.0f} s ago"
        return named(label, size(pages * page_bytes(picture), look), f"{age}{unsure}")
    if shown.position is not None:
        return named(label, "not recorded", "", MUTED)
    return named(label, "w reads it", "", MUTED)


def _page_truth(shown: Shown) -> tuple[int, int] | None:
    # Pages saved by what is mapped, and when that was read.
    if shown.savings is not None:
        return None if shown.savings.why_not else (shown.savings.saved_pages, shown.savings.at_ns)
    witnessed = shown.picture.witnessed if shown.picture else None
    if witnessed is None or witnessed.pages is None:
        return None
    frames = witnessed.pages.merged_frames()
    return int(frames["nr_pages"].sum()) - len(frames), witnessed.end_ns


def _yield(picture: Picture | None, look: Look) -> tuple[str, str]:
    if picture is None or picture.merges is None or len(picture.points) < 2:
        return "–", ""
    first, last = picture.points[0].cpu_ns, picture.points[-1].cpu_ns
    merged = picture.merges.succeeded + (picture.zero_merged or 0)
    if first is None or last is None or last <= first:
        return "–", ""
    return count(merged / ((last - first) / 1e9), look), "pages/CPU s"


def passes(picture: Picture | None, sample: CounterSample | None, look: Look) -> list[Line]:
    """Say where ksmd is in its passes, and what it scans."""
    heading: Line = [("PASSES", BOLD)]
    scans = number(sample, "full_scans")
    lines: list[Line] = [heading]
    if picture is not None and picture.passes is None:
        heading.append(("  not visible on this kernel", MUTED))
    elif picture is not None and picture.passes is not None:
        figures = picture.passes
        last = figures.last[-1] if figures.last else None
        if last is not None and last.end_ns is None and last.begin_ns is not None:
            heading.append((f"  seqnr {last.seq}", ""))
            if number(sample, "run") == 0:
                begun = duration(picture.at_ns - last.begin_ns, look)
                lines.append(named("halted in it", f"after {begun}"))
            else:
                lines.append(_progress(picture, last.begin_ns, look))
        elif last is not None:
            heading.append((f"  seqnr {last.seq} ended", ""))
            ago = duration(picture.at_ns - (last.end_ns or 0), look)
            lines.append(named("between passes", ago, "since"))
        else:
            lines.append(named("none seen", "–"))
        lines.append(
            named(
                "median, longest",
                f"{duration(figures.median_ns, look)}, {duration(figures.longest_ns, look)}",
            )
        )
        lines.append(
            named("complete", f"{figures.completed:,}", f"full_scans {count(scans, look)}")
        )
        per_cpu = figures.pages_per_cpu_second
        text = "–" if per_cpu is None else f"{count(per_cpu, look)}/CPU s"
        lines.append(named("pages", text))
    if picture is not None:
        scanned = last_rate(picture.points, lambda point: point.pages_scanned)
        if number(sample, "pages_scanned") is None:
            lines.append(named("scanned", ABSENT, "", MUTED))
        else:
            lines.append(named("scanned", "–" if scanned is None else rate(scanned, look)))
    return lines


def _progress(picture: Picture, begin_ns: int, look: Look) -> Line:
    assert picture.passes is not None
    elapsed_ns = picture.at_ns - begin_ns
    median_ns = picture.passes.median_ns
    if not median_ns:
        return named("under way", duration(elapsed_ns, look))
    share = min(elapsed_ns / median_ns, 1.0)
    done = round(share * 6)
    bar = "█" * done + "░" * (6 - done)
    return named("under way", duration(elapsed_ns, look), f"{bar} est.")


OVERVIEW_GRAPHS = ("merged", "zero_merged", "left", "cow_ksm", "scanned", "cpu")


def trees(picture: Picture | None, sample: CounterSample | None, look: Look) -> list[Line]:
    """Write the sizes of the trees, by the counters and by the events."""
    state = picture.trees.state if picture and picture.trees else None
    totals = state.totals if state else None
    heads = f"  {'':<15}{'counters':>10}{'events':>10}"
    older = state.older.stable_nodes if state and state.older else 0
    note = f"  {count(older, look)} nodes are older" if older else ""
    lines: list[Line] = [[("TREES", BOLD), (note, MUTED)], line(heads, MUTED)]
    rows = (
        ("pages_shared", "stable nodes"),
        ("pages_sharing", "pages saved"),
        ("pages_unshared", "unstable"),
        ("pages_volatile", "volatile"),
        ("stable_node_chains", "chains"),
        ("stable_node_dups", "dups"),
    )
    for name, label in rows:
        by_events = getattr(totals, name, None) if totals else None
        told = (
            ""
            if name == "pages_volatile"
            else "–"
            if by_events is None
            else (count(by_events, look))
        )
        counted = number(sample, name)
        lines.append(
            [
                (f"  {label:<15}", MUTED),
                (cell(count(counted, look), 10), BOLD),
                (cell(told, 10), ""),
            ]
        )
        # mm/ksm.c:should_skip_rmap_item takes a page off its tree; what is in none is volatile.
        if name == "pages_volatile" and counted and number(sample, "smart_scan"):
            lines[-1][2] = ("  with skipped pages", MUTED)
    return lines


_SHORT = {
    "stable_node_chains_prune_millisecs": "prune_millisecs",
    "advisor_min_pages_to_scan": "advisor_min_pages",
    "advisor_max_pages_to_scan": "advisor_max_pages",
    "advisor_target_scan_time": "advisor_target",
}
_RUN = {0: "stopped", 1: "scanning", 2: "unmerged"}


def knobs(sample: CounterSample | None, look: Look) -> list[Line]:
    """Write the knobs in force, and those that were changed from here."""
    from ksmtrace.workload.knobs import KNOBS

    lines: list[Line] = [[("KNOBS", BOLD)]]
    changed = look.changed or {}
    for name in ("run", *(knob for knob in KNOBS if knob != "run")):
        value = None if sample is None else sample.ksm.get(name)
        if name.startswith("advisor_") and name != "advisor_mode":
            advisor = None if sample is None else sample.ksm.get("advisor_mode")
            if advisor != "scan-time" and name not in changed:
                continue
        text = ABSENT if value is None else str(value)
        if name == "run" and isinstance(value, int):
            text += f" ({_RUN.get(value, 'unknown')})"
        style = MUTED if value is None else BOLD
        said: Line = [(f"  {_SHORT.get(name, name):<19}", MUTED), (text, style)]
        if name in changed:
            said.append((f" CHANGED, was {changed[name]}", WARN))
        lines.append(said)
    return lines
