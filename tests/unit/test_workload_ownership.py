import os
import signal
from pathlib import Path

import pytest

from ksmtrace.errors import CannotRun
from ksmtrace.workload.ownership import take_ownership
from ksmtrace.workload.signals import Interrupted, stop_on_signals


def test_one_owner_at_a_time_and_the_refusal_names_it(tmp_path: Path) -> None:
    first = take_ownership(tmp_path / "lock")
    first.publish({"run": "0"})
    with pytest.raises(CannotRun, match=rf"held by pid {os.getpid()} \(.*python") as refusal:
        take_ownership(tmp_path / "lock")
    assert refusal.value.exit_status == 3
    assert str(tmp_path / "lock") in (refusal.value.hint or "")
    first.settle()
    first.close()
    second = take_ownership(tmp_path / "lock")
    assert second.orphan is None
    second.close()


def test_an_owner_that_died_leaves_its_claim(tmp_path: Path) -> None:
    first = take_ownership(tmp_path / "lock")
    first.publish({"run": "1", "pages_to_scan": "101"})
    first.close()
    second = take_ownership(tmp_path / "lock")
    assert second.orphan is not None
    assert second.orphan.saved == {"run": "1", "pages_to_scan": "101"}
    second.close()


def test_a_claim_of_another_boot_is_void(tmp_path: Path) -> None:
    claim = '{"pid": 1, "command": "x", "boot_id": "another", "saved": {"run": "1"}}'
    (tmp_path / "lock").write_text(claim)
    ownership = take_ownership(tmp_path / "lock")
    assert ownership.orphan is None
    ownership.close()


def test_a_process_forked_meanwhile_keeps_the_lock(tmp_path: Path) -> None:
    first = take_ownership(tmp_path / "lock")
    first.publish({})
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_fd)
        os.read(read_fd, 1)
        os._exit(0)
    first.close()
    with pytest.raises(CannotRun):
        take_ownership(tmp_path / "lock")
    os.close(write_fd)
    os.waitpid(child, 0)
    os.close(read_fd)
    take_ownership(tmp_path / "lock").close()


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_pause_with_its_status(signum: signal.Signals, status: int) -> None:
    before = signal.getsignal(signum)
    with stop_on_signals() as stop:
        stop.check()
        os.kill(os.getpid(), signum)
        with pytest.raises(Interrupted) as interrupted:
            stop.pause(60)
    assert interrupted.value.exit_status == status
    assert str(interrupted.value) == f"stopped by {signum.name}"
    assert signal.getsignal(signum) == before
