"""Changing one of KSM's knobs because a person asked for it: it stays changed."""

from __future__ import annotations

from ksmtrace.errors import KernelFeatureMissing
from ksmtrace.kernel.sysfs import DIRECTORY
from ksmtrace.workload.knobs import KNOBS, read_knobs, set_knob
from ksmtrace.workload.ownership import take_ownership


def change_knob(name: str, value: str) -> str:
    """Write a knob, and leave it so.

    Returns:
        Its value before.

    Raises:
        KernelFeatureMissing: this kernel has no such knob.
        CannotRun: another ksmtrace owns the knobs, or the kernel refused the value.
    """
    if name not in KNOBS:
        raise KernelFeatureMissing(f"{name} is no knob of KSM")
    ownership = take_ownership()
    try:
        before = read_knobs().get(name)
        if before is None:
            raise KernelFeatureMissing(f"this kernel has no /{DIRECTORY}/{name}")
        set_knob(name, value)
    finally:
        ownership.close()
    return before
