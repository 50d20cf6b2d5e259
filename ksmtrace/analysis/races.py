"""The known races and lock troubles of KSM: each with what would show it in a recording.

The ids R1 to R25 are those of the catalogue that the claims come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ksmtrace.analysis.contention import df_waits
from ksmtrace.analysis.migrations import find_migrations
from ksmtrace.analysis.outcomes import count_causes, df_failures
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.analysis.visits import slot_bounds
from ksmtrace.events import KIND_BY_NAME, Events, MergeStep, of_kind
from ksmtrace.kernel.facts import MEMORY_ACTIONS
from ksmtrace.units import text_duration

_SLOW_BREAK_NS = 10_000_000
_SLOW_WALK_NS = 1_000_000
_MOST_WALKS = 3
_IDLE_S = 5.0
_IDLE_SHARE = 0.05
_UNSTABLE_FLAG = 0x100  # mm/ksm.c, in rmap_item->address
_SEQNR_MASK = 0xFF
_PAGE_MASK = ~np.uint64(0xFFF)


@dataclass(frozen=True)
class Sighting:
    """What a detector found.

    Attributes:
        times: how often; None: it could not tell after all.
        evidence: a few sentences: of the first and the worst, or of what was looked at.
        why_not: why ``times`` is None.
    """

    times: int | None
    evidence: list[str] = field(default_factory=list)
    why_not: str | None = None


@dataclass(frozen=True)
class Race:
    """One race or lock trouble.

    Attributes:
        id: R1 to R25.
        what: what happens.
        source: where in the kernel.
        needs: kinds of event without which the detector is blind; ``counters`` of samples besides.
        detect: looks for it; None where nothing shows it.
        blind: why nothing shows it, for one without a detector.
        fault: whether one sighting is a fault of the kernel, and not only a delay.
        unprovoked: why no kernel could be made to show it, so that its detector is only tried on
            recordings that were altered; "" where one was (tests/vm/test_races.py).
    """

    id: str
    what: str
    source: str
    needs: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    detect: Callable[[Recorded], Sighting] | None = None
    blind: str = ""
    fault: bool = False
    unprovoked: str = ""


@dataclass(frozen=True)
class Verdict:
    """What is known of one race after a recording.

    Attributes:
        id, what, source, fault, unprovoked: as of :class:`Race`.
        verdict: ``seen``, ``not seen``, or ``cannot be seen`` here.
        times: how often it was seen; None where it cannot be.
        evidence: see :class:`Sighting`.
        why_not: why it cannot be seen, None where it can.
    """

    id: str
    what: str
    source: str
    fault: bool
    unprovoked: str
    verdict: str
    times: int | None
    evidence: list[str]
    why_not: str | None


def find_races(recorded: Recorded) -> list[Verdict]:
    """Look for each race of :data:`RACES`, in that order."""
    return [_judge(race, recorded) for race in RACES]


def _judge(race: Race, recorded: Recorded) -> Verdict:
    found = _look(race, recorded)
    verdict = "cannot be seen" if found.times is None else "seen" if found.times else "not seen"
    return Verdict(
        race.id, race.what, race.source, race.fault, race.unprovoked, verdict, found.times,
        found.evidence, found.why_not,
    )  # fmt: skip


def _look(race: Race, recorded: Recorded) -> Sighting:
    if race.detect is None:
        return Sighting(None, why_not=race.blind)
    unseen = [kind for kind in race.needs if not recorded.can_see(kind)]
    if unseen:
        return Sighting(None, why_not=f"it takes {' and '.join(unseen)}, absent here")
    streamed = [kind for kind in race.needs if recorded.only_counted(kind)]
    if streamed and race.detect not in _BY_COUNTS:
        return Sighting(
            None, why_not=f"it takes every {' and '.join(streamed)}: record --every-page"
        )
    if race.counters and len(recorded.samples) < 2:
        return Sighting(None, why_not="it takes two samples of the counters")
    absent = [
        name for name in race.counters if any(s.ksm.get(name) is None for s in recorded.samples)
    ]
    if absent:
        return Sighting(None, why_not=f"this kernel has no {' and '.join(absent)}")
    lost = [kind for kind in race.needs if recorded.lost().get(kind)]
    found = race.detect(recorded)
    if lost and found.times == 0:
        return Sighting(None, why_not=f"events of {' and '.join(lost)} are lost")
    return found


# --- detectors


def _busy(recorded: Recorded) -> Sighting:
    counted = recorded.losses[-1].counted if recorded.losses else {}
    if "stable_tree_search.busy" not in counted:
        return Sighting(None, why_not="the recording has no counts of searches")
    times = counted["stable_tree_search.busy"]
    searches = sum(n for name, n in counted.items() if name.startswith("stable_tree_search."))
    return Sighting(
        times, [f"{times:,} of {searches:,} searches of the stable tree ended in -EBUSY"]
    )


def _failed_merges(recorded: Recorded) -> Sighting:
    causes = count_causes(df_failures(recorded))
    return Sighting(
        int(causes["failures"].sum()),
        [f"{failures:,} {cause}" for cause, failures in
         zip(causes["cause"], causes["failures"], strict=True)],
    )  # fmt: skip


def _twins(recorded: Recorded) -> Sighting:
    failures = df_failures(recorded)
    split = failures["steps"].fillna(0).to_numpy(np.int64) & int(MergeStep.SPLIT) != 0
    return Sighting(
        int((failures["cause"] == "large_folio_twins").sum()),
        [f"{int(split.sum()):,} merges failed after a large folio was to be split"],
    )


def _age(recorded: Recorded) -> Sighting:
    """Age in passes of unstable rmap_items when ksmd comes to them: mm/ksm.c allows 0 and 1."""
    visits, seq = _visits_with_seq(recorded)
    unstable = (visits["flags_before"] & _UNSTABLE_FLAG) != 0
    age = (seq - visits["flags_before"].astype("int64")) & _SEQNR_MASK
    old = unstable & (seq >= 0) & (age > 1)
    return Sighting(
        int(old.sum()),
        [f"{int((unstable & (seq >= 0)).sum()):,} unstable rmap_items looked at, the oldest of age "
         f"{int(age[unstable & (seq >= 0)].max(initial=0))}"],
    )  # fmt: skip


def _wrap(recorded: Recorded) -> Sighting:
    """Unstable items that were not looked at for 256 passes: their seqnr would look young again."""
    visits, seq = _visits_with_seq(recorded)
    known = (seq >= 0) & (visits["rmap_item"] != 0)
    # A freed rmap_item's place in memory is another's next, even of the same mm and address: but
    # that is not in the tree when it is first looked at.
    table = pd.DataFrame(
        {
            "rmap_item": visits["rmap_item"][known],
            "mm": visits["mm"][known],
            "address": visits["address"][known] & _PAGE_MASK,
            "seq": seq[known],
        }
    )
    gaps = table.groupby(["rmap_item", "mm", "address"])["seq"].diff()
    gaps = gaps[(visits["flags_before"][known] & _UNSTABLE_FLAG) != 0].dropna()
    return Sighting(
        int((gaps > _SEQNR_MASK).sum()),
        [f"longest time between two looks at one rmap_item: {int(gaps.max())} passes"]
        if len(gaps)
        else ["no unstable rmap_item was looked at twice"],
    )


def _visits_with_seq(recorded: Recorded) -> tuple[Events, np.ndarray]:
    visits = of_kind(recorded.events, "cmp_and_merge_page")
    starts = of_kind(recorded.events, "ksm_start_scan")
    at = np.searchsorted(starts["ts_ns"], visits["ts_ns"], "right") - 1
    seq = np.where(at >= 0, starts["seq"].astype("int64")[at] if len(starts) else -1, -1)
    return visits, seq


def _torn_migration(recorded: Recorded) -> Sighting:
    moved = of_kind(recorded.events, "ksm_migrate_page")
    wrong = (moved["kpfn_before"] != moved["pfn"]) | (moved["kpfn_after"] != moved["new_pfn"])
    return Sighting(
        int(wrong.sum()),
        [f"in {len(moved):,} migrations kpfn was compared before and after"],
    )


def _mutex_waits(recorded: Recorded) -> Sighting:
    waits = _waits_for(recorded, "ksm_thread_mutex")
    return _of_waits(recorded, waits[waits["holder_pid"] == _ksmd(recorded)])


def _exiting_waits(recorded: Recorded) -> Sighting:
    waits = _waits_for(recorded, "ksm_thread_mutex")
    return _of_waits(recorded, waits[waits["exiting"]])


def _exit_waits(recorded: Recorded) -> Sighting:
    entry = next(e for e in recorded.header.plan if e["event"] == "lock_wait")
    in_exit = "__ksm_exit" in (entry.get("target") or "")
    if not in_exit and not recorded.has_field("lock_hold", "lock_address"):
        return Sighting(
            None,
            why_not="an exiting task has itself been the last to read (kernel/exit.c:exit_mm): it "
            "takes a program on __ksm_exit, or the holds of mmap_locks",
        )
    waits = _waits_for(recorded, "mmap_lock")
    ended = waits[waits["exclusive"] & (waits["pid"] != _ksmd(recorded))]
    exits = [
        any(frame.startswith("__ksm_exit+") for frame in recorded.stacks.get(stack, []))
        or bool(exiting)
        for stack, exiting in zip(ended["stack"], ended["exiting"], strict=True)
    ]
    return _of_waits(recorded, ended[np.array(exits, bool)])


def _writers_wait(recorded: Recorded) -> Sighting:
    waits = _waits_for(recorded, "mmap_lock")
    for_ksmd = (waits["holder_pid"] == _ksmd(recorded)) & (waits["pid"] != _ksmd(recorded))
    # Whoever reads waits behind them, too, as /proc/PID/ksm_stat does.
    return _of_waits(recorded, waits[for_ksmd & waits["exclusive"]])


def _waits_for(recorded: Recorded, lock: str) -> pd.DataFrame:
    waits = df_waits(recorded)
    return waits[waits["lock"] == lock]


def _ksmd(recorded: Recorded) -> int:
    return int(recorded.header.facts.get("ksmd_pid") or 0)


def _of_waits(recorded: Recorded, waits: pd.DataFrame) -> Sighting:
    evidence = [
        f"{row['comm']} ({row['pid']}) waited {text_duration(row['duration_ns'])}"
        for row in waits.nlargest(3, "duration_ns").to_dict("records")
    ]
    return Sighting(len(waits), evidence)


def _after_exit(recorded: Recorded) -> Sighting:
    """Pages merged in an mm after its __ksm_exit, and before its address was used again.

    By the function that merges, as ksmd has the mmap_lock there: ksm_merge_with_ksm_page fires when
    it has released that (mm/ksm.c:try_to_merge_with_ksm_page), and an exit may come before.
    """
    events = recorded.events
    touched = of_kind(events, "try_to_merge_one_page")
    touched = touched[touched["err"] == 0]
    bounds = of_kind(events, "ksm_enter", "ksm_exit")
    nr_exits = int((bounds["kind"] == KIND_BY_NAME["ksm_exit"].number).sum())
    nr_enters = len(bounds) - nr_exits
    looked_at = f"{len(touched):,} merges; mms that came: {nr_enters:,}, that left: {nr_exits:,}"
    if not len(touched) or not len(bounds):
        return Sighting(0, [looked_at])
    names = ("ts_ns", "mm", "kind")
    lives = pd.DataFrame({name: bounds[name] for name in names}).astype({"ts_ns": "int64"})
    merges = pd.DataFrame({name: touched[name] for name in names[:2]}).astype({"ts_ns": "int64"})
    joined = pd.merge_asof(
        merges.sort_values("ts_ns"), lives.sort_values("ts_ns"), on="ts_ns", by="mm"
    )
    gone = joined["kind"] == of_kind(events, "ksm_exit")["kind"][:1].max(initial=0)
    return Sighting(int(gone.sum()), [looked_at])


def _slow_break(recorded: Recorded) -> Sighting:
    calls = of_kind(recorded.events, "break_ksm")
    page_bytes = recorded.header.facts.get("page_size_bytes") or 4096
    span = calls["end_address"].astype("int64") - calls["address"].astype("int64")
    pages = np.where(calls["end_address"] == 0, 1, np.maximum(span // page_bytes, 1))
    per_page = calls["duration_ns"] // pages.astype("uint64")
    slow = per_page > _SLOW_BREAK_NS
    worst = text_duration(int(per_page.max(initial=0)))
    return Sighting(
        int(slow.sum()),
        [f"{len(calls):,} calls of break_ksm, the slowest {worst} per page; how often each faulted "
         "is not seen"],
    )  # fmt: skip


def _partial_unmerge(recorded: Recorded) -> Sighting:
    stores = of_kind(recorded.events, "run_store")
    unmerging = stores[stores["run"] == 2]
    failed = unmerging[unmerging["err"] < 0]
    return Sighting(
        len(failed),
        [f"run=2 ended with {int(one['err'])} after {text_duration(int(one['duration_ns']))}"
         for one in failed[:3]]
        or [f"writes of 2 to run: {len(unmerging):,}, none failed"],
    )  # fmt: skip


def _sleeps_on(recorded: Recorded) -> Sighting:
    """Stretches in which ksmd should scan and does not."""
    times, longest = 0, 0
    for first, last in _runs_of(recorded, lambda a, b: _should_scan(a, b) and _unmoved(a, b)):
        span_ns = last.begin_ns - first.end_ns
        pause_ns = 1_000_000 * max(int(first.ksm.get("sleep_millisecs") or 0), 1)
        longest = max(longest, span_ns)
        times += span_ns > max(_IDLE_S * 1e9, 10 * pause_ns)
    return Sighting(
        times, [f"longest time without a scanned page, though run is 1: {text_duration(longest)}"]
    )


def _burns_idle(recorded: Recorded) -> Sighting:
    """Stretches in which ksmd uses its CPU though nothing is mergeable."""
    times, worst = 0, 0.0
    came_or_went_ns = np.sort(of_kind(recorded.events, "ksm_enter", "ksm_exit")["ts_ns"])

    def nothing_to_scan(before: Any, after: Any) -> bool:
        # What comes and goes between two samples is in neither.
        begin, end = np.searchsorted(came_or_went_ns, (before.begin_ns, after.end_ns))
        return begin == end and _nothing_to_scan(before, after)

    for first, last in _runs_of(recorded, nothing_to_scan):
        cpu = _difference(first.ksmd, last.ksmd, "cpu_ns")
        span_ns = last.begin_ns - first.end_ns
        if cpu is None or span_ns < 1_000_000_000:
            continue
        worst = max(worst, cpu / span_ns)
        times += cpu / span_ns > _IDLE_SHARE
    return Sighting(times, [f"most of a CPU that ksmd used with nothing registered: {worst:.1%}"])


def _runs_of(recorded: Recorded, holds: Callable[[Any, Any], bool]) -> list[tuple[Any, Any]]:
    """Return the longest stretches of samples in which each and its next satisfy a condition."""
    runs: list[tuple[Any, Any]] = []
    since = None
    for before, after in zip(recorded.samples, recorded.samples[1:], strict=False):
        if holds(before, after):
            since = since or before
            if runs and runs[-1][0] is since:
                runs.pop()
            runs.append((since, after))
        else:
            since = None
    return runs


def _should_scan(before: Any, after: Any) -> bool:
    return before.ksm["run"] == after.ksm["run"] == 1 and any(
        stat.get("ksm_mergeable") == "yes" or stat.get("ksm_rmap_items")
        for stat in after.processes.values()
    )


def _unmoved(before: Any, after: Any) -> bool:
    return _difference(before.ksm, after.ksm, "pages_scanned") == 0


def _nothing_to_scan(before: Any, after: Any) -> bool:
    counts = ("pages_shared", "pages_unshared", "pages_volatile")
    return before.ksm["run"] == after.ksm["run"] == 1 and not any(
        sample.processes or any(sample.ksm[name] for name in counts) for sample in (before, after)
    )


def _difference(before: Any, after: Any, name: str) -> int | None:
    first, last = before.get(name), after.get(name)
    return last - first if isinstance(first, int) and isinstance(last, int) else None


def _failed_break_cow(recorded: Recorded) -> Sighting:
    calls = of_kind(recorded.events, "break_ksm")
    of_ksmd = calls[calls["task_pid"] == _ksmd(recorded)]
    return Sighting(
        int((of_ksmd["err"] != 0).sum()), [f"{len(of_ksmd):,} calls of break_ksm by ksmd"]
    )


def _across_nodes(recorded: Recorded) -> Sighting:
    if not any(sample.ksm.get("merge_across_nodes") == 0 for sample in recorded.samples):
        return Sighting(0, ["merge_across_nodes was not 0: there is one tree for all nodes"])
    migrations = find_migrations(recorded)
    assert migrations is not None
    crossed = [route for route in migrations.routes if route.from_node != route.to_node]
    return Sighting(
        sum(route.pages for route in crossed),
        [f"{route.pages:,} from node {route.from_node} to node {route.to_node}: until ksmd visits "
         "them, their stable_nodes are in the other node's tree" for route in crossed],
    )  # fmt: skip


def _offline(recorded: Recorded) -> Sighting:
    calls = of_kind(recorded.events, "ksm_memory_callback")
    number = recorded.header.facts.get("memory_actions") or MEMORY_ACTIONS
    over = {number["MEM_OFFLINE"]: "offline", number["MEM_CANCEL_OFFLINE"]: "called off"}
    going = calls[calls["action"] == number["MEM_GOING_OFFLINE"]]
    evidence = []
    for begin in going[:3]:
        later = calls[(calls["ts_ns"] > begin["ts_ns"]) & np.isin(calls["action"], [*over])]
        if len(later):
            span_ns = int(later["ts_ns"][0]) - int(begin["ts_ns"])
            evidence.append(
                f"KSM_RUN_OFFLINE was set for {text_duration(span_ns)}, then "
                f"{over[int(later['action'][0])]}"
            )
    waits = _waits_for(recorded, "ksm_thread_mutex")
    takers = [
        int(wait["duration_ns"])
        for call in going
        for wait in waits[waits["pid"] == call["pid"]].to_dict("records")
        if call["ts_ns"] - call["duration_ns"] <= wait["end_ns"] <= call["ts_ns"]
    ]
    if takers:
        evidence.append(
            f"{len(takers):,} times it waited for ksm_thread_mutex, at most "
            f"{text_duration(max(takers))}"
        )
    return Sighting(len(going), evidence)


def df_walks(recorded: Recorded) -> pd.DataFrame:
    """Return every walk of rmap_walk_ksm, one row each in order of its end.

    :data:`ksmtrace.analysis.frames.FRAMES` documents the columns.
    """
    walks = of_kind(recorded.events, "rmap_walk_ksm")
    return pd.DataFrame(
        {
            "end_ns": walks["ts_ns"].astype("int64"),
            "duration_ns": walks["duration_ns"].astype("int64"),
            "sharers": walks["sharers"].astype("int64"),
            "pfn": walks["pfn"].astype("int64"),
            "pid": walks["pid"].astype("int64"),
            "comm": pd.Series(
                [name.decode(errors="replace") for name in walks["comm"].tolist()], dtype="string"
            ),
        }
    )


def walks_by_sharers(recorded: Recorded) -> pd.DataFrame:
    """Summarize how long walks over all that map a KSM page took, by how many share it.

    Returns:
        One row per power of two of sharers that occurs. Columns: ``from``, ``below`` (number of
        sharers), ``walks``, ``median_ns``, ``p99_ns``, ``longest_ns``, ``total_ns`` (int64). A
        page without a stable_node has no number of sharers, and no row.
    """
    walks = df_walks(recorded)
    walks = walks[walks["sharers"] >= 0]
    bits = np.ceil(np.log2(walks["sharers"].to_numpy() + 1.0)).astype(np.int64)
    groups = walks["duration_ns"].groupby(bits)
    slots = [slot_bounds(slot) for slot in np.unique(bits).tolist()]
    return pd.DataFrame(
        {
            "from": [low for low, _ in slots],
            "below": [below for _, below in slots],
            "walks": groups.size().to_numpy(),
            "median_ns": groups.median().to_numpy(),
            "p99_ns": groups.quantile(0.99).to_numpy(),
            "longest_ns": groups.max().to_numpy(),
            "total_ns": groups.sum().to_numpy(),
        }
    ).astype("int64")


def _long_walks(recorded: Recorded) -> Sighting:
    walks = df_walks(recorded)
    by_sharers = walks_by_sharers(recorded)
    evidence = [
        f"{row['walks']:,} walks over {row['from']:,} to {row['below'] - 1:,} sharers: median "
        f"{text_duration(row['median_ns'])}, longest {text_duration(row['longest_ns'])}"
        for row in by_sharers[-_MOST_WALKS:].to_dict("records")
    ]
    return Sighting(int((walks["duration_ns"] > _SLOW_WALK_NS).sum()), evidence)


_BY_COUNTS = frozenset({_busy})

_FATE = ("try_to_merge_one_page", "ksm_enter", "ksm_exit")

RACES = (
    Race("R1", "a stable page is locked while ksmd has found it equal",
         "mm/ksm.c:stable_tree_search, get_ksm_page(TRYLOCK) = -EBUSY", ("stable_tree_search",),
         detect=_busy),
    Race("R2", "a merge fails: page locked, pinned, split refused, changed",
         "mm/ksm.c:try_to_merge_one_page", ("merge_failure",), detect=_failed_merges),
    Race("R3", "an unstable rmap_item older than one pass", "mm/ksm.c:remove_rmap_item_from_tree, "
         "BUG_ON(age > 1)", ("cmp_and_merge_page", "ksm_start_scan"), detect=_age, fault=True,
         unprovoked="each pass frees or looks at every rmap_item (scan_get_next_rmap_item), and "
         "the kernel stops itself where one is older: the oldest was of age 1 in 300 passes"),
    Race("R4", "a page moves while its stable_node is looked up",
         "mm/ksm.c:folio_migrate_ksm, get_ksm_page", ("ksm_migrate_page",), detect=_torn_migration,
         fault=True,
         unprovoked="both pages are locked while kpfn changes (folio_migrate_ksm): the moves of a "
         "page that 1,009 share left none behind; how long look-ups spin is in the locks"),
    Race("R5", "a stable_node is removed as stale while its page is alive",
         "mm/ksm.c:get_ksm_page",
         blind="events tell that a node went, not that its page is mapped: tree --verify compares "
         "both"),
    Race("R6", "two pages of one folio: the second reference keeps it from being split",
         "mm/ksm.c:cmp_and_merge_page", ("merge_failure", "split_huge_page_to_list"),
         detect=_twins),
    Race("R7", "the other page is freed after a split", "proposed in 2023 and not merged",
         blind="no kernel has that code"),
    Race("R8", "knob writers and unmerges wait for ksmd's batch",
         "mm/ksm.c: ksm_thread_mutex", ("lock_wait",), detect=_mutex_waits),
    Race("R9", "an exiting task waits for ksm_thread_mutex", "mm/ksm.c:__ksm_exit must not take it",
         ("lock_wait",), detect=_exiting_waits, fault=True,
         unprovoked="__ksm_exit takes ksm_mmlist_lock and the mmap_lock only: processes that "
         "exited in the middle of a batch waited for the mmap_lock, and never for the mutex"),
    Race("R10", "an exiting task waits for the mmap_lock that ksmd holds",
         "mm/ksm.c:__ksm_exit, mmap_write_lock", ("lock_wait",), detect=_exit_waits),
    Race("R11", "mmap and munmap wait for ksmd's mmap_lock", "mm/ksm.c: mmap_read_lock",
         ("lock_wait",), detect=_writers_wait),
    Race("R12", "ksmd merges in an mm that has left", "mm/ksm.c:ksm_test_exit", _FATE,
         detect=_after_exit, fault=True,
         unprovoked="find_mergeable_vma asks ksm_test_exit under the mmap_lock, which __ksm_exit "
         "waits for: merges in processes that were killed meanwhile failed (cause mm_exits)"),
    Race("R13", "a fault brings back a page after zap", "mm/memory.c, historical",
         blind="the code that did it went in 2009; nothing marks such a fault"),
    Race("R14", "break_ksm does not end", "mm/ksm.c:break_ksm, its loop", ("break_ksm",),
         detect=_slow_break),
    Race("R15", "run=2 ends before all is unmerged", "mm/ksm.c:run_store, "
         "unmerge_and_remove_all_rmap_items", ("run_store",), detect=_partial_unmerge),
    Race("R16", "ksmd sleeps though there is something to scan", "mm/ksm.c:__ksm_enter, wakeup",
         counters=("run", "pages_scanned"), detect=_sleeps_on, fault=True,
         unprovoked="__ksm_enter puts the mm on the list before it wakes ksmd, and ksmd looks at "
         "the list after it has put itself to sleep: no wake-up is lost"),
    Race("R17", "break_cow fails and leaves a KSM page that no stable_node knows",
         "mm/ksm.c:break_cow", ("break_ksm",), detect=_failed_break_cow),
    Race("R18", "a swap entry is used again while its page is copied", "mm/memory.c:do_swap_page",
         blind="only the content of the process's page would show it"),
    Race("R19", "a stable_node in another node's tree after its page moved",
         "mm/ksm.c:folio_migrate_ksm with merge_across_nodes=0", ("ksm_migrate_page",),
         detect=_across_nodes),
    Race("R20", "memory goes offline while ksmd scans", "mm/ksm.c:ksm_memory_callback",
         ("ksm_memory_callback",), detect=_offline),
    Race("R21", "a truncation makes break_ksm's fault fail with SIGBUS", "mm/ksm.c:break_ksm",
         blind="break_ksm returns 0 then too, and what its faults return is not recorded"),
    Race("R22", "counters are read in the middle of a change", "mm/ksm.c: sysfs readers",
         blind="pages_volatile is cut off at 0 by the kernel, and the rmap_items of exited "
         "processes are in no counter: a torn reading looks like them"),
    Race("R23", "the 8 bits of seqnr come round", "mm/ksm.c: SEQNR_MASK",
         ("cmp_and_merge_page", "ksm_start_scan"), detect=_wrap, fault=True,
         unprovoked="each pass looks at or frees every rmap_item, but for what smart_scan lets be "
         "for 8 passes at most (should_skip_rmap_item): of more than 300 passes none was near"),
    Race("R24", "ksmd uses its CPU though nothing is mergeable", "mm/ksm.c:ksmd_should_run",
         counters=("run", "pages_shared", "pages_unshared", "pages_volatile"), detect=_burns_idle,
         fault=True,
         unprovoked="ksmd_should_run is false on an empty list: ksmd used no CPU in 3 s"),
    Race("R25", "rmap walks of more than 1 ms over a page's sharers", "mm/ksm.c:rmap_walk_ksm",
         ("rmap_walk_ksm",), detect=_long_walks),
)  # fmt: skip
"""Every race of the catalogue."""
