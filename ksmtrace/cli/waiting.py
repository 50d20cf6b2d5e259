"""Says on stderr what takes long, as long as it does."""

from __future__ import annotations

import sys
import threading
import time
from typing import Self

import click

_FIRST_S = 1.0
_STEP_S = 0.5


class Waiting:
    """Shows what is under way and for how long, on a terminal and after the first second only.

    Args:
        what: what is under way first; "" for nothing yet.
    """

    def __init__(self, what: str = "") -> None:
        self._what = what
        self._began_s = time.monotonic()
        self._ended = threading.Event()
        self._shown = False
        self._thread: threading.Thread | None = None

    def show(self, what: str) -> None:
        """Say what is under way from now on."""
        self._what, self._began_s = what, time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)

    def _run(self) -> None:
        while not self._ended.wait(_STEP_S):
            elapsed_s = time.monotonic() - self._began_s
            if self._what and elapsed_s >= _FIRST_S:
                click.echo(f"\r\x1b[K{self._what}: {elapsed_s:.0f} s", err=True, nl=False)
                self._shown = True
