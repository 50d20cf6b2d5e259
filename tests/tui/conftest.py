"""Driving the application without a terminal, over recordings of real kernels."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ksmtrace.capture.session import Progress
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import Batch, Item
from ksmtrace.tui.app import Top
from ksmtrace.tui.engine import Engine
from ksmtrace.tui.live import LiveEngine
from ksmtrace.tui.moment import Phase
from ksmtrace.tui.replay import ReplayEngine

RECORDINGS = Path(__file__).parent.parent / "golden" / "recordings"
SCREENS = Path(__file__).parent / "screens"
WAIT_S = 300.0


def text_of(app: Top) -> str:
    """Return what is on the screen, a line per row."""
    console = Console(
        width=app.size.width,
        height=app.size.height,
        file=io.StringIO(),
        force_terminal=True,
        color_system=None,
        record=True,
        legacy_windows=False,
    )
    console.print(app.screen._compositor.render_update(full=True))
    return "\n".join(line.rstrip() for line in console.export_text(styles=False).splitlines())


def wait(condition: Callable[[], Any]) -> None:
    """Wait until something is so without a screen; fail where it is not in time."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {WAIT_S:g} s"
        time.sleep(0.01)


async def until(pilot: Any, condition: Callable[[], Any]) -> None:
    """Wait until something is so; fail where it is not in time."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, (
            f"waited in vain for {WAIT_S:g} s:\n{text_of(pilot.app)}"
        )
        await pilot.pause(0.02)


class Capture:
    """A capture that yields what a recording holds: to the engine it is a live one.

    Args:
        name: the recording.
        ends: whether it ends with the recording, or goes on until it is asked to end.
        times: how often the batches are yielded.
        failure: raised when the recording has been yielded.
    """

    def __init__(
        self,
        name: str,
        asked: Callable[[], str | None],
        ends: bool = False,
        times: int = 1,
        failure: Exception | None = None,
    ) -> None:
        reader = RecordingReader(RECORDINGS / f"{name}.ksmt")
        self.header = reader.header
        self.progress = Progress()
        self.closed = False
        self._items = list(reader)
        self._asked, self._ends, self._times, self._failure = asked, ends, times, failure

    def __iter__(self) -> Iterator[Item]:
        *items, trailer = self._items
        for item in items:
            for _ in range(self._times if isinstance(item, Batch) else 1):
                yield item
        if self._failure is not None:
            raise self._failure
        while not self._ends and self._asked() is None:
            time.sleep(0.005)
        yield trailer

    def close(self) -> None:
        self.closed = True


def live_engine(name: str, most_waiting: int = 1 << 20, **options: Any) -> LiveEngine:
    """Return an engine to which a recording is the running kernel."""
    return LiveEngine(lambda asked: Capture(name, asked, **options), most_waiting=most_waiting)


def drive(
    engine: Engine,
    act: Callable[[Any, Top], Awaitable[None]],
    size: tuple[int, int] = (80, 24),
) -> Top:
    """Run the application, wait for its first picture, and do something with it."""
    app = Top(engine)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: engine.shown.picture is not None)
            await settled(pilot, engine)
            await act(pilot, app)

    asyncio.run(run())
    engine.stop()
    assert engine.join()
    assert engine.crashed is None
    return app


async def settled(pilot: Any, engine: Engine) -> None:
    """Wait until a replay that begins at its end has come there, and is drawn."""
    if isinstance(engine, ReplayEngine):
        await until(pilot, lambda: engine.shown.phase in (Phase.ENDED, Phase.FAILED))
    await drawn(pilot)


async def drawn(pilot: Any) -> None:
    """Wait until the last moment is on the screen."""
    await until(pilot, lambda: pilot.app._drawn and pilot.app._drawn[0] == pilot.app.shown.number)
    # What was drawn is laid out by messages, of which some bring others.
    before = None
    while before != (before := text_of(pilot.app)):
        await pilot.pause(0.05)
        await pilot.pause()


def compare(name: str, text: str) -> None:
    """Compare a screen with the one that was looked at and kept."""
    path = SCREENS / f"{name}.txt"
    if os.environ.get("KSMTRACE_KEEP_SCREENS") == "1":
        path.write_text(text + "\n")
        return
    assert path.exists(), f"{path} is not kept: look at it with KSMTRACE_KEEP_SCREENS=1"
    assert text + "\n" == path.read_text()


@dataclass(frozen=True)
class Driving:
    """What the tests share: modules in tests cannot import each other."""

    recordings = RECORDINGS
    text_of = staticmethod(text_of)
    wait = staticmethod(wait)
    until = staticmethod(until)
    drawn = staticmethod(drawn)
    drive = staticmethod(drive)
    compare = staticmethod(compare)
    live_engine = staticmethod(live_engine)

    @staticmethod
    def replay(name: str) -> ReplayEngine:
        return ReplayEngine(RECORDINGS / f"{name}.ksmt", at_end=True)


@pytest.fixture
def tui(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driving]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.chdir(tmp_path)
    yield Driving()
    monkeypatch.undo()
    time.tzset()
