"""What a workload did step by step, and what the kernel said at each step: plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ksmtrace.stream import Scalar


class NotRead(LookupError):
    """A trial has no such step, or the kernel no such counter."""


@dataclass(frozen=True)
class Reading:
    """What was read at one step, while ksmd rested unless the trial says otherwise.

    Attributes:
        label: the step's name.
        begin_ns, end_ns: CLOCK_MONOTONIC before and after the reading.
        counters: every file of /sys/kernel/mm/ksm and line of /proc/vmstat that concerns KSM;
            None for what this kernel does not have.
        processes: by name of the process the lines of its /proc/PID/ksm_stat.
        places: pages of the workload's areas that are present, of all its processes.
        frames: page frames that these places map, each counted once: ``places - frames`` pages
            of memory are saved, by whatever shares them. Both None where frames cannot be seen.
        notes: what the workload itself did, got or saw, by name.
    """

    label: str
    begin_ns: int
    end_ns: int
    counters: Mapping[str, Scalar]
    processes: Mapping[str, Mapping[str, Scalar]]
    places: int | None
    frames: int | None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def number(self, name: str) -> int:
        """Return a counter's value.

        Raises:
            NotRead: this kernel does not have it.
        """
        value = self.counters.get(name)
        if not isinstance(value, int):
            raise NotRead(f"this kernel has no {name}")
        return value


@dataclass(frozen=True)
class Trial:
    """One workload, as it was carried out.

    Attributes:
        name: the workload's.
        parameters: its numbers.
        begin_ns, end_ns: CLOCK_MONOTONIC of its begin and end.
        readings: in order; the first is of before the workload's processes registered.
        others: other processes that used KSM meanwhile.
        why_not: why it was not carried out to its end; None where it was.
    """

    name: str
    parameters: Mapping[str, int]
    begin_ns: int
    end_ns: int
    readings: tuple[Reading, ...]
    others: tuple[str, ...] = ()
    why_not: str | None = None

    def at(self, label: str) -> Reading:
        """Return the reading of a step.

        Raises:
            NotRead: there is no such step.
        """
        for reading in self.readings:
            if reading.label == label:
                return reading
        raise NotRead(f"the workload {self.name} has no step {label}")

    def change(self, label: str, name: str, since: str | None = None) -> int:
        """Return how much a counter has changed until a step.

        Args:
            label: the step.
            name: the counter.
            since: the step to count from; None for the first reading.

        Raises:
            NotRead: no such step, or this kernel does not have the counter.
        """
        first = self.readings[0] if since is None else self.at(since)
        return self.at(label).number(name) - first.number(name)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Trial:
        """Make it from what :meth:`to_json` returned."""
        readings = tuple(Reading(**reading) for reading in content["readings"])
        others = tuple(content["others"])
        return cls(**{**content, "readings": readings, "others": others})
