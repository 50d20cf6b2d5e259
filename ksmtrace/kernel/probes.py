"""The outcomes of what is tried out on the running kernel, where presence proves nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadProbe:
    """Whether one kind of program loads and attaches here.

    Attributes:
        works: None where it could not be tried.
        reason: what was done, or the step that failed with its errno.
    """

    works: bool | None
    reason: str


@dataclass(frozen=True)
class KpfProbe:
    """Whether bit KPF_KSM of /proc/kpageflags tells the truth.

    Attributes:
        truthful: None where it could not be tried.
        reason: what was seen, or what prevented the attempt.
    """

    truthful: bool | None
    reason: str
