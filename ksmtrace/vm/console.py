"""What a guest's console says about its end."""

from __future__ import annotations

import re

TAIL_LINES = 25
# How much of a death is shown; several kernels' reports of a panic have 40 lines.
DEATH_LINES = 80

# Printed by kernel/panic.c:panic, arch/x86/kernel/dumpstack.c:__die_header ("Oops: ") and by the
# page fault, soft lockup and RCU stall reports. What says most comes first: with `oops=panic`, an
# oops ends in a panic that says nothing of its cause.
_SIGNS = (
    ("kernel panic", re.compile(r"Kernel panic - not syncing: (?!Fatal exception)(?P<why>.*)")),
    ("kernel bug", re.compile(r"kernel BUG at (?P<why>.*)")),
    ("oops", re.compile(r"\bOops: (?P<why>.*)")),
    ("kernel bug", re.compile(r"\bBUG: (?P<why>.*)")),
    ("kernel panic", re.compile(r"Kernel panic - not syncing: (?P<why>.*)")),
    ("stalled CPU", re.compile(r"rcu: INFO: (?P<why>.*detected.*stall.*)")),
    ("no root file system", re.compile(r"(?P<why>Failed to mount real root.*)")),
)
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[c()][0-9A-Za-z]?)|[\x00-\x08\x0b-\x1f\x7f]")


def clean_console(raw: bytes) -> str:
    """Return what a console showed, without the escape sequences of firmware and terminals."""
    return _ESCAPES.sub("", raw.decode(errors="replace"))


def find_death(console: str) -> str | None:
    """Return why the kernel died, as ``KIND: WHY``, or None where the console shows nothing."""
    for kind, sign in _SIGNS:
        found = sign.search(console)
        if found:
            return f"{kind}: {found['why'].strip()}"
    return None


def tail(console: str) -> tuple[str, ...]:
    """Return the last lines that are not blank: all from the kernel's death on, if it died.

    A report of a panic is longer than a screenful, and what it begins with says most.
    """
    lines = [line.rstrip() for line in console.splitlines() if line.strip()]
    begin = len(lines) - TAIL_LINES
    for number, line in enumerate(lines):
        if number >= begin or find_death(line):
            return tuple(lines[number : number + DEATH_LINES])
    return ()
