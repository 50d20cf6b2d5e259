"""Kinds of option values that several commands take."""

from __future__ import annotations

import math
from typing import Any

import click

_SHIFTS = {"K": 10, "M": 20, "G": 30}


class Size(click.ParamType[int]):
    """A size in bytes, written with an optional K, M or G.

    Args:
        default_unit: the unit of a number without one, a key of K, M and G; None for bytes.
    """

    name = "size"

    def __init__(self, default_unit: str | None = None) -> None:
        self._default_shift = _SHIFTS[default_unit] if default_unit else 0

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse ``16M`` to bytes."""
        if isinstance(value, int):
            return value
        shift = _SHIFTS.get(value[-1:].upper())
        digits = value if shift is None else value[:-1]
        if not digits.isdecimal():
            self.fail(f"{value!r} is no size; write for example 64K or 16M", param, ctx)
        return int(digits) << (self._default_shift if shift is None else shift)


without_option = click.option(
    "--without",
    metavar="RUNG",
    multiple=True,
    type=click.Choice(["tracepoint", "fentry", "kprobe", "inlined site", "watchpoint", "derived"]),
    help="As if this kernel did not offer RUNG (tracepoint, fentry, kprobe, 'inlined site', "
    "watchpoint, derived): to compare the ways to catch an event. May be repeated.",
)
"""The rungs that are not to be taken (:data:`ksmtrace.capture.hooks.RUNGS`)."""


class Seconds(click.FloatRange):
    """A number of seconds; neither infinite nor "not a number"."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse the number."""
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds
