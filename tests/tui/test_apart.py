"""The engine in a process of its own: the same moments, and an end that is told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.errors import BackendUnavailable
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.tui.apart import EngineApart
from ksmtrace.tui.live import LiveEngine
from ksmtrace.tui.moment import Phase
from ksmtrace.tui.replay import ReplayEngine
from ksmtrace.tui.wire import Packer, Unpacker

WAIT_S = 300.0


@pytest.mark.parametrize("size", [(80, 24), (160, 50)], ids=["80x24", "160x50"])
def test_the_screen_is_the_same(tui, size):
    screens = {}

    async def act(pilot, app):
        for key, name in {"1": "overview", "3": "trees", "7": "events"}.items():
            await pilot.press(key)
            await tui.until(pilot, lambda: app.shown.phase is Phase.ENDED)
            await tui.drawn(pilot)
            screens[name] = tui.text_of(app)

    engine = EngineApart(tui.replay("guest-7.x-fork-every-page"))
    tui.drive(engine, act, size)
    for name, text in screens.items():
        tui.compare(f"guest-7.x-fork-every-page-{name}-{size[0]}x{size[1]}", text)


def test_claims_come_over_as_they_were_judged(tui):
    engine = EngineApart(tui.replay("guest-7.x-churn"))
    engine.start()
    tui.wait(lambda: engine.shown.phase is Phase.ENDED)
    engine.ask_claims()
    tui.wait(lambda: engine.shown.judged is not None)
    words = {one.word for one in engine.shown.judged.judgements}
    assert {"holds", "unknown", "refuted"} <= words
    engine.stop()
    assert engine.join()


@pytest.mark.parametrize("name", ["guest-6.12-witnessed", "contended-storm", "losses"])
def test_every_moment_comes_over_whole(tui, name):
    # Three moments: what stays is sent once, and must still be there in the last one.
    packer, unpacker = Packer(), Unpacker()
    engine = tui.replay(name)
    engine.start()
    tui.wait(lambda: engine.shown.phase is Phase.ENDED)
    sizes = []
    for _ in range(3):
        packed, arrays = packer.pack(engine.shown)
        sizes.append(len(packed) + sum(map(len, arrays)))
        come = unpacker.unpack(packed, [bytes(array) for array in arrays])
        there, here = come.picture, engine.shown.picture
        assert there.merges == here.merges and there.passes == here.passes
        assert there.books == here.books and there.processes == here.processes
        assert there.header == here.header and there.sample == here.sample
        assert there.waits == here.waits and there.pages == here.pages
        for table in ("stable_nodes", "rmap_items", "chains"):
            rows = getattr(there.trees.state, table)
            assert np.array_equal(rows, getattr(here.trees.state, table))
        for ours, theirs in zip(there.tail, here.tail, strict=True):
            assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    assert sizes[2] == sizes[1] < sizes[0] / 4
    engine.stop()
    assert engine.join()


def test_an_engine_that_is_killed_is_told(tui):
    engine = EngineApart(tui.live_engine("cow"))

    async def act(pilot, app):
        os.kill(engine.pid, signal.SIGKILL)
        await tui.until(pilot, lambda: app.shown.phase is Phase.FAILED)
        await tui.drawn(pilot)
        text = " ".join(tui.text_of(app).split())
        assert "was ended by SIGKILL; what is shown is from before" in text
        await pilot.press("6")
        await tui.drawn(pilot)
        assert "not judged: the process that takes in" in " ".join(tui.text_of(app).split())

    tui.drive(engine, act)
    assert engine.failure.exit_status == 3


def test_a_killed_engine_is_not_said_to_record(tui, tmp_path):
    engine = EngineApart(tui.live_engine("cow"))
    # Obeyed before it starts: this capture stands still after its last event.
    engine.record(tmp_path / "before.ksmt")

    async def act(pilot, app):
        await tui.until(pilot, lambda: app.shown.recorder is not None)
        os.kill(engine.pid, signal.SIGKILL)
        await tui.until(pilot, lambda: app.shown.phase is Phase.FAILED)
        await tui.drawn(pilot)
        text = tui.text_of(app)
        assert "● REC" not in text and "NOT RECORDED" in text
        assert "! recording cut off: the process that takes in" in text
        await pilot.press("r")
        await pilot.pause()
        assert ["not done" in one.message for one in app._notifications] == [True]

    tui.drive(engine, act)
    assert not list(tmp_path.glob("ksmtrace-*"))


def test_an_engine_that_cannot_begin_says_why(tui):
    def refuse(asked):
        raise BackendUnavailable("bcc is not installed", "apt-get install python3-bpfcc")

    engine = EngineApart(LiveEngine(refuse))
    engine.start()
    tui.wait(lambda: engine.shown.phase is Phase.FAILED)
    engine.stop()
    assert engine.join()
    assert type(engine.failure) is BackendUnavailable and engine.failure.exit_status == 3
    assert engine.failure.hint == "apt-get install python3-bpfcc"


def test_a_screen_that_goes_away_lets_the_engine_end_in_order(tui, tmp_path):
    path = tmp_path / "all.ksmt"
    engine = EngineApart(tui.live_engine("guest-6.1-lifetime"))
    engine.start()
    tui.wait(lambda: engine.shown.can_record is not None)
    engine.record(path)
    tui.wait(lambda: engine.shown.picture is not None)
    engine._socket.close()
    tui.wait(lambda: engine._has_ended())
    assert os.waitstatus_to_exitcode(engine._status) == 0
    reader = RecordingReader(path)
    assert sum(1 for _ in reader) and reader.cut_off is None


def test_a_recording_is_replayed_from_the_keys(tui):
    engine = EngineApart(ReplayEngine(tui.recordings / "guest-7.x-churn.ksmt", at_end=True))
    engine.start()
    tui.wait(lambda: engine.shown.phase is Phase.ENDED)
    length_ns = engine.shown.position.length_ns
    engine.seek(0.5)
    tui.wait(lambda: engine.shown.position.at_ns == round(0.5 * length_ns))
    engine.step()
    tui.wait(lambda: engine.shown.position.at_ns == round(0.5 * length_ns) + 250_000_000)
    engine.stop()
    assert engine.join()


def on_a_terminal(arguments):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    program = "from ksmtrace.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    read = b""
    while b"TREES" not in read:
        assert select.select([ours], [], [], WAIT_S)[0], read
        read += os.read(ours, 1 << 16)
    return process, ours


def children_of(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_on_a_terminal_q_ends_both_processes_with_status_0(tui):
    process, ours = on_a_terminal(["top", "--end", str(tui.recordings / "cow.ksmt")])
    (engine,) = children_of(process.pid)
    os.write(ours, b"q")
    while process.poll() is None:
        if select.select([ours], [], [], 0.05)[0]:
            with contextlib.suppress(OSError):
                os.read(ours, 1 << 16)
    assert process.returncode == 0
    tui.wait(lambda: not Path(f"/proc/{engine}").exists())
    os.close(ours)
