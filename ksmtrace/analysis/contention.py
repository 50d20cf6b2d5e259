"""Who waited for which lock, how long, and who held it meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from ksmtrace.analysis.recorded import Recorded
from ksmtrace.analysis.visits import Histogram, find_histogram
from ksmtrace.capture.hooks import ABSENT, WAITED_BY
from ksmtrace.events import Events, Lock, LockFlag, of_kind

_MOST_WORST = 8
_HOLDER_BY = {
    LockFlag.KSMD_HELD: "seen",
    LockFlag.HOLDER_OWNS: "owner",
    LockFlag.HOLDER_READ_LAST: "last reader",
}


@dataclass(frozen=True)
class Party:
    """Waits of one task for a lock, or for one task that held it.

    Attributes:
        pid: tgid.
        comm: None where unknown.
        waits: how many.
        total_ns, worst_ns: how long, all together and the longest.
    """

    pid: int
    comm: str | None
    waits: int
    total_ns: int
    worst_ns: int


@dataclass(frozen=True)
class Wait:
    """One of the longest waits or holds.

    Attributes:
        ts_ns: when it was over, CLOCK_MONOTONIC.
        pid: tgid of who waited or held; comm: its name, None where unknown.
        duration_ns: how long.
        exclusive: whether to write; a mutex always is.
        exiting: whether the task was exiting.
        holder_pid, holder: who held the lock when the wait began; None where unknown.
        holder_by: how that is known: ``seen`` (ksmd was seen to take it), ``owner`` (the lock's
            own exclusive owner), ``last reader`` (it may have left already), ``walk`` or ``merge``
            (of a page's lock: see :func:`df_waits`); None without one.
        waiters: waits that began during a hold; None for a wait.
        stack: the task's kernel stack at the end, the innermost first; None where not kept.
    """

    ts_ns: int
    pid: int
    comm: str | None
    duration_ns: int
    exclusive: bool
    exiting: bool
    holder_pid: int | None
    holder: str | None
    holder_by: str | None
    waiters: int | None
    stack: list[str] | None


@dataclass(frozen=True)
class Contention:
    """What happened at one lock of :class:`ksmtrace.events.Lock`; None: not observable.

    Attributes:
        waits, total_wait_ns, worst_wait_ns, wait_histogram: by the kernel side's tallies, so that
            lost events are in them; the worst of a part of a recording is by its events. The
            histogram is None where there was no wait, too.
        waiters, holders: by events: who waited, and for whom; those who waited longest first.
        worst: the longest waits, by events.
        holds, total_hold_ns, worst_hold_ns, hold_histogram: the same of ksmd's holds.
        worst_holds: the longest holds, by events.
        why_not: by ``waits`` or ``holds``, why these are None; also what they leave out.
    """

    waits: int | None
    total_wait_ns: int | None
    worst_wait_ns: int | None
    wait_histogram: Histogram | None
    waiters: list[Party]
    holders: list[Party]
    worst: list[Wait]
    holds: int | None
    total_hold_ns: int | None
    worst_hold_ns: int | None
    hold_histogram: Histogram | None
    worst_holds: list[Wait]
    why_not: dict[str, str] = field(default_factory=dict)


def df_waits(recorded: Recorded) -> pd.DataFrame:
    """Return every wait (lock_wait, __folio_lock, get_ksm_page), one row each, in order of its end.

    A page's lock does not tell its owner. Whoever was in rmap_walk_ksm of the page, or in
    try_to_merge_one_page, when the wait began, had it: the first is called with the lock only
    (mm/ksm.c:rmap_walk_ksm, VM_BUG_ON), and the second tries it, and else is over at once.

    Returns:
        The columns of :data:`ksmtrace.analysis.frames.FRAMES`.
    """
    events = of_kind(recorded.events, "lock_wait", *WAITED_BY.values())
    table = _frame(events)
    names = [name.decode(errors="replace") for name in events["comm"].tolist()]
    table["comm"] = pd.array(names, dtype="string")
    table["holder_pid"] = events["holder_pid"].astype("int64")
    by = np.full(len(events), None, object)
    for flag, name in _HOLDER_BY.items():
        by[(events["lock_flags"] & flag) != 0] = name
    folio = (table["lock"] == Lock.FOLIO.name.lower()).to_numpy()
    waits = table[["begin_ns", "lock_address"]][folio]
    holder_pid = table["holder_pid"].to_numpy(copy=True)
    for kind, name in (("try_to_merge_one_page", "merge"), ("rmap_walk_ksm", "walk")):
        holder = _who_was_in(recorded, kind, waits)
        known = np.flatnonzero(folio)[holder != 0]
        holder_pid[known], by[known] = holder[holder != 0], name
    table["holder_pid"] = holder_pid
    table["holder_by"] = pd.array(by, dtype="string")
    table["err"] = events["err"].astype("int64")
    return table


def _who_was_in(recorded: Recorded, kind: str, waits: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Return per wait for a page's lock who was in a function with that page as it began, or 0."""
    nobody = np.zeros(len(waits), np.int64)
    size = recorded.header.facts.get("page_struct_bytes")
    placed = of_kind(recorded.whole().events, "ksm_merge_with_ksm_page")
    placed = placed[(placed["ksm_page"] != 0) & (placed["pfn"] != 0)][:1]
    calls = of_kind(recorded.whole().events, kind)
    if not size or not len(placed) or not len(calls) or not len(waits):
        return nobody
    end_ns, duration_ns = (calls[name].astype("int64") for name in ("ts_ns", "duration_ns"))
    # ksmd alone merges, and such an event's pid is the page's owner's.
    ksmd = int(recorded.header.facts.get("ksmd_pid") or 0)
    spans = pd.DataFrame(
        {
            "begin_ns": end_ns - duration_ns,
            "end_ns": end_ns,
            "page": placed["ksm_page"][0] + (calls["pfn"] - placed["pfn"][0]) * np.uint64(size),
            "who": ksmd if kind == "try_to_merge_one_page" else calls["pid"].astype("int64"),
        }
    )
    wanted = waits.rename(columns={"lock_address": "page"}).reset_index(drop=True)
    joined = pd.merge_asof(
        wanted.reset_index().sort_values("begin_ns"),
        spans.sort_values("begin_ns"),
        on="begin_ns",
        by="page",
    ).sort_values("index")
    within = (joined["begin_ns"] <= joined["end_ns"]).to_numpy()
    return np.where(within, joined["who"].fillna(0).to_numpy(np.int64), nobody)


def df_holds(recorded: Recorded) -> pd.DataFrame:
    """Return ksmd's holds with waiters and the longest ones, one row each in order of their end.

    Returns:
        The columns of :data:`ksmtrace.analysis.frames.FRAMES`.
    """
    events = of_kind(recorded.events, "lock_hold")
    table = _frame(events)
    table["waiters"] = events["waiters"].astype("int64")
    return table


def _frame(events: Events) -> pd.DataFrame:
    names = np.array([lock.name.lower() for lock in Lock], object)
    end_ns, duration_ns = (events[name].astype("int64") for name in ("ts_ns", "duration_ns"))
    return pd.DataFrame(
        {
            "begin_ns": end_ns - duration_ns,
            "end_ns": end_ns,
            "duration_ns": duration_ns,
            "lock": pd.array(names[np.minimum(events["lock"], len(names) - 1)], dtype="string"),
            "lock_address": events["lock_address"].copy(),
            "pid": events["pid"].astype("int64"),
            "exclusive": (events["lock_flags"] & LockFlag.EXCLUSIVE) != 0,
            "exiting": (events["lock_flags"] & LockFlag.EXITING) != 0,
            "stack": events["stack"].astype("int64"),
        }
    )


def find_contention(recorded: Recorded) -> dict[str, Contention]:
    """Return what happened at each lock, by its name."""
    waits, holds = df_waits(recorded), df_holds(recorded)
    return {
        lock.name.lower(): _of_lock(
            recorded,
            lock,
            waits[waits["lock"] == lock.name.lower()],
            holds[holds["lock"] == lock.name.lower()],
        )
        for lock in Lock
    }


def _of_lock(
    recorded: Recorded, lock: Lock, waits: pd.DataFrame, holds: pd.DataFrame
) -> Contention:
    why_not: dict[str, str] = {}
    tallies: dict[str, _Tallies | None] = {}
    waited_by = WAITED_BY.get(lock, "lock_wait")
    for side, kind, what in (("wait_ns", waited_by, "waits"), ("hold_ns", "lock_hold", "holds")):
        name = f"{side}.{lock.name.lower()}"
        tallies[side] = _tallies(recorded, name, waits if side == "wait_ns" else holds)
        if tallies[side] is None:
            why_not[what] = _why_not(recorded, lock, kind)
    waited = tallies["wait_ns"] or _NO_TALLIES
    held = tallies["hold_ns"] or _NO_TALLIES
    names = dict(zip(waits["pid"], waits["comm"], strict=True))
    return Contention(
        waits=waited[0],
        total_wait_ns=waited[1],
        worst_wait_ns=waited[2],
        wait_histogram=waited[3],
        waiters=_parties(recorded, waits, "pid", names),
        holders=_parties(recorded, waits[waits["holder_pid"] != 0], "holder_pid", {}),
        worst=_worst(recorded, waits),
        holds=held[0],
        total_hold_ns=held[1],
        worst_hold_ns=held[2],
        hold_histogram=held[3],
        worst_holds=_worst(recorded, holds),
        why_not=why_not,
    )


_Tallies = tuple[int | None, int | None, int | None, Histogram | None]
_NO_TALLIES: _Tallies = (None, None, None, None)


def _tallies(recorded: Recorded, name: str, events: pd.DataFrame) -> _Tallies | None:
    counted = recorded.losses[-1].counted if recorded.losses else {}
    if f"{name}.times" not in counted:
        return None
    worst: int | None
    times, total, worst = (counted[f"{name}.{tally}"] for tally in ("times", "total", "worst"))
    if recorded.selection is not None:
        # Times and sums count from the span's begin; the longest ever may have been before it.
        worst = int(events["duration_ns"].max()) if len(events) else None
    return times, total, worst, find_histogram(recorded.losses[-1].histograms.get(name))


def _why_not(recorded: Recorded, lock: Lock, kind: str) -> str:
    entry = next((e for e in recorded.header.plan if e["event"] == kind), None)
    if entry is None:
        return "the recording is older than this"
    if entry["rung"] == ABSENT:
        return str(entry["reason"])
    if kind == "lock_hold":
        if lock == Lock.MMAP_LOCK:
            return str(entry["missing_fields"].get("lock_address", _no_tallies(recorded)))
        if lock == Lock.REFCOUNT:
            return "nobody holds it: it is frozen"
        if lock != Lock.KSM_THREAD_MUTEX:
            return "no tracepoint tells when it is taken without a wait"
    return _no_tallies(recorded)


def _no_tallies(recorded: Recorded) -> str:
    if recorded.whole().losses:
        return "the kernel side's counts were not read in this span"
    return "the recording has no tallies"


def _parties(
    recorded: Recorded, waits: pd.DataFrame, column: str, names: dict[int, str]
) -> list[Party]:
    groups = waits.groupby(column, as_index=False).agg(
        waits=("duration_ns", "size"),
        total_ns=("duration_ns", "sum"),
        worst_ns=("duration_ns", "max"),
        ts_ns=("end_ns", "max"),
    )
    groups = groups.sort_values("total_ns", ascending=False)
    return [
        Party(pid, names.get(pid) or recorded.name_of(pid, ts_ns), count, total_ns, worst_ns)
        for pid, count, total_ns, worst_ns, ts_ns in groups.astype("int64").itertuples(
            index=False, name=None
        )
    ]


def _worst(recorded: Recorded, rows: pd.DataFrame) -> list[Wait]:
    """Return the longest; the stack of the same place is shown with each that has one."""
    longest = rows.nlargest(_MOST_WORST, "duration_ns")
    return [
        Wait(
            ts_ns=row["end_ns"],
            pid=row["pid"],
            comm=row.get("comm") or recorded.name_of(row["pid"], row["end_ns"]),
            duration_ns=row["duration_ns"],
            exclusive=row["exclusive"],
            exiting=row["exiting"],
            holder_pid=row.get("holder_pid") or None,
            holder=recorded.name_of(row["holder_pid"], row["end_ns"])
            if row.get("holder_pid")
            else None,
            holder_by=by if isinstance(by := row.get("holder_by"), str) else None,
            waiters=row.get("waiters"),
            stack=recorded.stacks.get(row["stack"]),
        )
        for row in longest.to_dict("records")
    ]
