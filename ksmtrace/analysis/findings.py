"""What in a recording asks for action: short sentences with their evidence."""

from __future__ import annotations

from ksmtrace.analysis.books import CONTRADICTION, balance
from ksmtrace.analysis.calls import find_calls
from ksmtrace.analysis.merges import find_merges
from ksmtrace.analysis.migrations import find_migrations
from ksmtrace.analysis.passes import df_passes
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.units import text_bytes, text_duration

_LONG_PASS_NS = 600_000_000_000
_LEAST_ATTEMPTS = 100
_BAD_SUCCESS_RATE = 0.5


def find(recorded: Recorded) -> list[str]:
    """List what a person should know first, the most pressing first."""
    merges = find_merges(recorded)
    calls = find_calls(recorded)
    migrations = find_migrations(recorded)
    findings = [
        f"{entry.counter} moved by {entry.delta}, but the events say {entry.events_say}, and "
        "mm/ksm.c allows no such difference: a fault of the kernel, or of ksmtrace"
        for entry in balance(recorded)
        if entry.verdict == CONTRADICTION
    ]
    lost = sum(recorded.lost().values())
    if lost:
        ring_bytes = recorded.header.settings.get("ring_bytes")
        than = f" than {text_bytes(ring_bytes)}" if ring_bytes else ""
        at_most = "up to " if recorded.selection is not None else ""
        findings.append(
            f"{at_most}{lost:,} events found the ring full and are lost: record with a larger "
            f"--ring{than}"
        )
    if migrations is not None and migrations.left_behind:
        findings.append(
            f"{migrations.left_behind} of {migrations.pages} KSM pages moved without their "
            "stable_node: kpfn is not the new frame's, so ksmd will take the node for stale"
        )
    findings += [
        f"{name} was entered {call.entered} times and returned {call.returned} times: "
        f"{call.missed} calls are missing in what its exit tells (a kretprobe has no more than a "
        "few calls at a time in view)"
        for name, call in (calls or {}).items()
        if call.missed
    ]
    if not recorded.samples:
        where = "span" if recorded.selection else "recording"
        return [*findings, f"no sample of the kernel's counters is in the {where}"]
    knobs = [sample.ksm for sample in recorded.samples]
    last = knobs[-1]
    scanned = recorded.count("ksm_start_scan") + recorded.count("ksm_stop_scan")
    if not scanned and all(knob.get("run") == 0 for knob in knobs):
        findings.append(
            "ksmd was stopped at every sample (run is 0): start it with "
            "`echo 1 > /sys/kernel/mm/ksm/run`"
        )
    elif not scanned:
        findings.append(_no_pass(recorded))
    if last.get("general_profit") is not None and int(last["general_profit"] or 0) < 0:
        cost = text_bytes(-int(last["general_profit"] or 0))
        findings.append(
            f"KSM costs {cost} more than it saves: its rmap_items outweigh the merged pages. Opt "
            "in fewer processes, or ones that have more in common"
        )
    attempts = len(merges.events)
    merged = int(merges.appended.sum())
    which = "The kernel's answer does not tell which"
    if recorded.can_see("merge_failure"):
        which = "Section outcomes tells why each failed, and what to do"
    if attempts >= _LEAST_ATTEMPTS and merged < attempts * _BAD_SUCCESS_RATE:
        findings.append(
            f"only {merged} of {attempts} attempts to merge succeeded: pages that are pinned "
            f"(O_DIRECT, VFIO), locked or changing. {which}"
        )
    durations = df_passes(recorded)["duration_ns"].dropna()
    if len(durations) and durations.median() > _LONG_PASS_NS:
        findings.append(
            f"a pass takes {text_duration(float(durations.median()))}, and an equal page merges "
            f"in its second: raise pages_to_scan (now {last.get('pages_to_scan')}) or set "
            "advisor_mode to scan-time"
        )
    return findings


def _no_pass(recorded: Recorded) -> str:
    first, last = recorded.samples[0].ksm, recorded.samples[-1].ksm
    scanned = int(last.get("pages_scanned") or 0) - int(first.get("pages_scanned") or 0)
    if last.get("pages_scanned") is None and recorded.losses:
        scanned = recorded.losses[-1].counted.get("cmp_and_merge_page", 0)
    if scanned:
        return (
            f"no pass began or ended, but {scanned} pages were scanned: one pass is longer than "
            f"the {'span' if recorded.selection else 'recording'}"
        )
    if recorded.selection is not None:
        return "ksmd did not scan in the span"
    return "ksmd did not scan: no process has mergeable memory (MADV_MERGEABLE or prctl)"
