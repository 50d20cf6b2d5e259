"""Times of a recording, as options take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ksmtrace.errors import UsageError


class Time(click.ParamType[float]):
    """Seconds since the recording began, or -N: seconds before its end."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse ``12.5`` or ``-3``; ``-0`` is the end."""
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is no time; write for example 12.5, or -3 for 3 s before the end")


def moment_ns(file: Path, time_s: float, started_ns: int, end_ns: int) -> int:
    """Return the CLOCK_MONOTONIC that is meant by a :class:`Time`.

    Args:
        file: the recording, to be named in an error.
        time_s: as parsed.
        started_ns: when the recording began, CLOCK_MONOTONIC.
        end_ns: when it ended.

    Raises:
        UsageError: the recording has no such time.
    """
    from_end = str(time_s).startswith("-")
    length_s = (end_ns - started_ns) / 1e9
    # Not a number is in no range either. Times are written in milliseconds, the end's too.
    if not 0 <= abs(time_s) <= length_s + 0.0005:
        raise UsageError(
            f"{file} has no time {time_s:g}",
            f"it is {length_s:.3f} s long: give 0 to {length_s:.3f}, or -{length_s:.3f} to -0",
        )
    return min(max((end_ns if from_end else started_ns) + round(time_s * 1e9), started_ns), end_ns)
