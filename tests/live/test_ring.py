"""The mapped ring on the running kernel: it wraps, it fills, and it keeps every event in order."""

import numpy as np
import pytest

from ksmtrace.capture.bcc_backend import Programs
from ksmtrace.capture.hooks import Attachment
from ksmtrace.capture.plan import make_plan
from ksmtrace.capture.ring import Ring
from ksmtrace.events import KIND_BY_NUMBER, KINDS, concatenate, of_kind
from ksmtrace.kernel.facts import read_facts

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("clean")]

SLOTS = 64
RING_BYTES = SLOTS * 64
NAMES = [kind.name for kind in KINDS if kind.has_tracepoint]


def attachments(names):
    return [Attachment("raw_tracepoint", name, 0, f"on_{name}") for name in names]


@pytest.fixture
def attached(live):
    """Programs with a tiny ring, and its consumer's side."""
    programs = Programs(attachments(NAMES), make_plan(read_facts()).defines, RING_BYTES)
    programs.begin()
    ring = Ring(programs.ring_fd, RING_BYTES)
    yield programs, ring
    ring.close()
    programs.close()


def counts(events):
    return {
        KIND_BY_NUMBER[number].name: int(np.count_nonzero(events["kind"] == number))
        for number in KIND_BY_NUMBER
    }


def settle(programs, ring, batches):
    """Detach, and drain what is left."""
    programs.detach()
    batches.append(ring.drain())
    return concatenate(batches), programs.tallies()


def test_events_come_out_whole_and_in_order_over_many_rounds_of_the_ring(live, attached):
    programs, ring = attached
    batches = []
    # Some 40 events for each of the processes: far fewer than slots, drained process by process.
    rounds = 12
    for _ in range(rounds):
        with live.holding(*live.workload("duplicates", "--pages", "13", "--contents", "2")):
            batches.append(ring.drain())
        batches.append(ring.drain())
    events, tallies = settle(programs, ring, batches)
    assert len(events) > 4 * SLOTS
    assert counts(events) == {name: produced for name, (produced, _) in tallies.items()}
    assert {dropped for _, dropped in tallies.values()} == {0}
    assert tallies["ksm_merge_with_ksm_page"] == (rounds * 39, 0)
    assert tallies["ksm_enter"] == tallies["ksm_exit"] == (rounds * 3, 0)
    assert np.all(np.diff(events["ts_ns"].astype(np.int64)) >= 0)
    assert set(of_kind(events, "ksm_merge_with_ksm_page")["err"]) == {0}


def test_a_full_ring_drops_the_newest_and_counts_them_per_kind(live, attached):
    programs, ring = attached
    with live.holding(*live.workload("duplicates", "--pages", "100")) as outcome:
        assert outcome["ok"] is True
        assert ring.fill == pytest.approx((SLOTS - 1) / SLOTS)
        oldest = ring.drain(10)
        assert ring.fill == pytest.approx((SLOTS - 11) / SLOTS)
    events, tallies = settle(programs, ring, [oldest])
    for name, (produced, dropped) in tallies.items():
        assert produced == counts(events)[name] + dropped, name
    assert tallies["ksm_merge_with_ksm_page"][0] == 300
    assert tallies["ksm_stop_scan"][0] >= outcome["passes"]
    assert np.all(np.diff(events["ts_ns"].astype(np.int64)) >= 0)
    assert counts(events)["ksm_enter"] == 3  # the first events are those that are kept
    assert ring.fill == 0


def test_taking_few_at_a_time_takes_the_same_events(live, attached):
    programs, ring = attached
    with live.holding(*live.workload("duplicates", "--pages", "10", "--contents", "2")):
        pieces = []
        while len(piece := ring.drain(7)):
            assert len(piece) <= 7
            pieces.append(piece)
    events, tallies = settle(programs, ring, pieces)
    assert counts(events) == {name: produced for name, (produced, _) in tallies.items()}
    assert len(ring.drain()) == 0


def test_batches_outlive_the_ring(live):
    programs = Programs(attachments(["ksm_enter"]), make_plan(read_facts()).defines, RING_BYTES)
    programs.begin()
    ring = Ring(programs.ring_fd, RING_BYTES)
    with live.holding(*live.workload("unique", "--pages", "1")):
        taken = ring.drain()
    ring.close()
    programs.close()
    assert counts(taken)["ksm_enter"] == 2
    assert all(comm.startswith(b"ksm-uniq") for comm in taken["comm"])
