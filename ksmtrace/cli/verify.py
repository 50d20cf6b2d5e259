"""``ksmtrace tree --verify``: reconstruction, kernel memory and what is mapped, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ksmtrace.errors import CannotRun, KernelFeatureMissing, UsageError

_PAIRS = {
    "reconstruction_and_memory": "reconstruction beside kernel memory",
    "memory_itself": "kernel memory beside itself",
    "memory_and_sysfs": "kernel memory beside /sys/kernel/mm/ksm",
    "memory_and_pages": "kernel memory beside what is mapped",
    "reconstruction_and_pages": "reconstruction beside what is mapped",
}


def verify_recording(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Compare at each moment of a recording at which the witnesses were read.

    Returns:
        Per moment plain JSON types: ``moment``, ``at_ns`` (since the recording began),
        ``consistent`` (null where kernel memory was not read; false also where an event happened
        during the reading), ``why_not``, and one entry per pair
        that could be compared: ``compared``, ``differences`` (count by what and cause), and
        ``contradictions`` (how many nothing explains). And why the recording ends before its
        time, None where it does not.

    Raises:
        UsageError: nobody read the witnesses while it was made.
    """
    from ksmtrace.reconstruct.replay import Replay
    from ksmtrace.recording.reader import RecordingReader
    from ksmtrace.stream import Witnessed

    reader = RecordingReader(file)
    readings = [item for item in reader if isinstance(item, Witnessed)]
    readings = [r for r in readings if r.memory is not None or r.pages is not None]
    if not readings:
        raise UsageError(
            f"{file} holds no reading of the kernel's own state"
            + (f" ({reader.cut_off})" if reader.cut_off else ""),
            "record with --witnesses, on a kernel whose memory or page maps can be read",
        )
    replay = Replay(lambda: RecordingReader(file))
    undisturbed = find_undisturbed(RecordingReader(file), readings)
    found = []
    for reading, is_undisturbed in zip(readings, undisturbed, strict=True):
        entry: dict[str, Any] = {
            "moment": reading.moment,
            "at_ns": reading.begin_ns - reader.header.started_ns,
            "consistent": reading.memory.consistent and is_undisturbed if reading.memory else None,
            "why_not": dict(reading.why_not),
        }
        state = replay.state_at(reading.begin_ns)
        entry |= _with_memory(state, reading.memory) if reading.memory else {}
        if reading.pages is not None:
            entry |= _with_pages(state, reading.memory, reading.pages)
        found.append(entry)
    return found, reader.cut_off


def find_undisturbed(stream: Any, readings: list[Any]) -> list[bool]:
    """Say per reading of the witnesses whether no event happened while it was made."""
    from ksmtrace.stream import Batch

    undisturbed = [True] * len(readings)
    for item in stream:
        if isinstance(item, Batch):
            times = item.events["ts_ns"]
            for at, reading in enumerate(readings):
                if ((times >= reading.begin_ns) & (times <= reading.end_ns)).any():
                    undisturbed[at] = False
    return undisturbed


def verify_live() -> list[dict[str, Any]]:
    """Compare what can be read of the running kernel now: moments as :func:`verify_recording`.

    Raises:
        KernelFeatureMissing: neither the kernel's memory nor what is mapped can be read.
    """
    from ksmtrace.kernel import sysfs
    from ksmtrace.kernel.ksm_memory import read_ksm_memory
    from ksmtrace.kernel.page_truth import read_page_truth

    memory, pages, why_not = None, None, {}
    before = sysfs.read_ksm()
    try:
        memory = read_ksm_memory()
    except CannotRun as error:
        why_not["memory"] = f"{error} ({error.hint})"
    try:
        pages = read_page_truth()
    except CannotRun as error:
        why_not["pages"] = f"{error} ({error.hint})"
    if memory is None and pages is None:
        raise KernelFeatureMissing("; ".join(why_not.values()), "run as root")
    ksm = sysfs.read_ksm() or {}
    # While ksmd runs, each reading is of another moment.
    at_rest = ksm == before and ksm.get("run") != 1
    entry: dict[str, Any] = {
        "moment": "now",
        "at_ns": None,
        "consistent": memory.consistent and at_rest if memory else None,
        "why_not": why_not,
    }
    if memory is not None:
        entry |= _memory_alone(memory)
        entry["memory_and_sysfs"] = _sysfs(memory, ksm)
        if pages is not None:
            entry |= _with_pages(None, memory, pages)
    elif pages is not None:
        entry["mapped"] = _mapped(pages, ksm)
    return [entry]


def _with_memory(state: Any, memory: Any) -> dict[str, Any]:
    from ksmtrace.reconstruct.verify import (
        Cause,
        What,
        compare_counters,
        compare_with_memory,
    )

    comparison = compare_with_memory(state, memory)
    named = [
        (What(row["what"]).name.lower(), Cause(row["cause"]).name.lower())
        for row in comparison.differences
    ]
    counters = compare_counters(state, memory)
    unequal = {
        name: {"reconstructed": ours, "kernel": theirs}
        for name, (ours, theirs) in counters.items()
        if ours is not None and ours != theirs
    }
    return {
        "reconstruction_and_memory": {
            "compared": dict(comparison.compared),
            "differences": _counted(named),
            "contradictions": len(comparison.contradictions),
            "unequal_counters": unequal,
        }
    } | _memory_alone(memory)


def _memory_alone(memory: Any) -> dict[str, Any]:
    from ksmtrace.kernel.ksm_check import check_ksm_memory

    violations = check_ksm_memory(memory)
    compared = {"stable_nodes": len(memory.stable_nodes), "rmap_items": len(memory.rmap_items)}
    return {
        "memory_itself": {
            "compared": compared,
            "differences": [
                {"what": text, "cause": "contradiction", "count": 1} for text in violations
            ],
            "contradictions": len(violations),
        }
    }


def _with_pages(state: Any, memory: Any, pages: Any) -> dict[str, Any]:
    from ksmtrace.kernel.ksm_memory import ItemState
    from ksmtrace.kernel.witnesses import Cause, compare_witnesses
    from ksmtrace.reconstruct.verify import as_memory

    known = memory if memory is not None else as_memory(state)
    causes = compare_witnesses(known, pages)["cause"].tolist()
    name = "memory_and_pages" if memory is not None else "reconstruction_and_pages"
    sharers = int((known.rmap_items["state"] == ItemState.STABLE).sum())
    return {
        name: {
            "compared": {"sharers": sharers, "pages": len(pages.pages)},
            "differences": _counted([("place", Cause(cause).name.lower()) for cause in causes]),
            "contradictions": causes.count(Cause.CONTRADICTION),
        }
    }


def _sysfs(memory: Any, ksm: Mapping[str, Any]) -> dict[str, Any]:
    from mmap import PAGESIZE

    said = memory.sysfs_values(PAGESIZE)
    compared = [name for name in said if ksm.get(name) is not None]
    unequal = [name for name in compared if said[name] != ksm[name]]
    return {
        "compared": {"files": len(compared)},
        "differences": [
            {
                "what": f"{name} {ksm[name]}, by memory {said[name]}",
                "cause": "read later",
                "count": 1,
            }
            for name in unequal
        ],
        "contradictions": 0 if not memory.consistent else len(unequal),
    }


def _mapped(pages: Any, ksm: Mapping[str, Any]) -> dict[str, Any]:
    frames = pages.merged_frames()
    return {
        "kpf_ksm_truthful": pages.kpf_ksm.truthful,
        "ksm_frames": len(frames),
        "places": int(frames["nr_pages"].sum()),
        "pages_shared": ksm.get("pages_shared"),
        "pages_sharing": ksm.get("pages_sharing"),
    }


def _counted(named: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"what": what, "cause": cause, "count": named.count((what, cause))}
        for what, cause in dict.fromkeys(named)
    ]


def verify_lines(entries: list[dict[str, Any]], cut_off: str | None) -> Iterator[str]:
    """Write the outcome for people, worst first to be seen: a contradiction is in capitals."""
    if cut_off is not None:
        yield f"the recording itself is INCOMPLETE: {cut_off}"
    for entry in entries:
        if entry["at_ns"] is None:
            yield "NOW"
        else:
            yield f"{entry['at_ns'] / 1e9:.2f} s AFTER THE RECORDING BEGAN ({entry['moment']})"
        if entry["consistent"] is False:
            yield "  KSM was at work meanwhile: differences may come of that, and do not count"
        for part, reason in entry["why_not"].items():
            yield f"  {part} not read: {reason}"
        for key, title in _PAIRS.items():
            if key in entry:
                yield from _pair_lines(title, entry[key])
        if "mapped" in entry:
            yield from _mapped_lines(entry["mapped"])


def _pair_lines(title: str, pair: Mapping[str, Any]) -> Iterator[str]:
    compared = ", ".join(f"{count:,} {name}" for name, count in pair["compared"].items())
    if not pair["differences"] and not pair.get("unequal_counters"):
        yield f"  {title}: no difference in {compared}"
        return
    verdict = (
        f"{pair['contradictions']:,} CONTRADICTIONS" if pair["contradictions"] else "explained"
    )
    yield f"  {title}: differences, {verdict}; compared: {compared}"
    for difference in pair["differences"]:
        yield f"    {difference['count']:>9,}  {difference['what']}: {difference['cause']}"
    for name, values in pair.get("unequal_counters", {}).items():
        yield f"    {name} {values['kernel']:,}, reconstructed {values['reconstructed']:,}"


def _mapped_lines(mapped: Mapping[str, Any]) -> Iterator[str]:
    doubt = (
        "" if mapped["kpf_ksm_truthful"] else " (KPF_KSM lies here: frames mapped several times)"
    )
    yield f"  mapped now: {mapped['ksm_frames']:,} KSM frames at {mapped['places']:,} places{doubt}"
    yield (
        f"  by sysfs: pages_shared {mapped['pages_shared']}, pages_sharing "
        f"{mapped['pages_sharing']}: as of ksmd's last visit to each page"
    )


def nr_contradictions(entries: list[dict[str, Any]]) -> int:
    """Count the differences that nothing explains, of consistent readings."""
    return sum(
        entry[key]["contradictions"]
        for entry in entries
        if entry["consistent"] is not False
        for key in _PAIRS
        if key in entry
    )
