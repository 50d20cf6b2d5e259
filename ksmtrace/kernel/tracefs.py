"""Formats of the ksm tracepoints, where tracefs happens to be mounted."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmtrace.errors import KernelInterfaceError, PrivilegeMissing
from ksmtrace.kernel.files import ROOT, read_text

MOUNT_POINTS = ("sys/kernel/tracing", "sys/kernel/debug/tracing")

_FIELD = re.compile(
    r"field:(?P<type>[^;]*?)(?P<name>\w+)(?P<array>\[[^\]]*\])?;\s*"
    r"offset:(?P<offset>\d+);\s*size:(?P<size>\d+);\s*signed:(?P<signed>[01]);"
)


@dataclass(frozen=True)
class FormatField:
    """One field of an event's record in the trace buffer.

    Attributes:
        name: its name.
        c_type: its C type as the kernel spells it.
        offset: bytes from the record's beginning.
        size: bytes.
        signed: whether the number is signed.
    """

    name: str
    c_type: str
    offset: int
    size: int
    signed: bool


@dataclass(frozen=True)
class EventFormat:
    """An event's ``format`` file.

    Attributes:
        name: the event's name.
        id: its number in the trace buffer.
        fields: its own fields, without the ``common_`` ones that every event has.
    """

    name: str
    id: int
    fields: tuple[FormatField, ...]


def read_formats(group: str = "ksm", root: Path = ROOT) -> Mapping[str, EventFormat] | None:
    """Read the formats of a group's events.

    Mounts nothing: where tracefs is not mounted, the answer is that nothing is known.

    Returns:
        Formats by event name, empty where the kernel has no such group; None where tracefs is
        not mounted.

    Raises:
        PrivilegeMissing: tracefs is there and closed to this user.
        KernelInterfaceError: a format is unreadable or malformed.
    """
    events = _find_events(root)
    if events is None:
        return None
    formats = {}
    try:
        names = sorted(entry.name for entry in (events / group).iterdir() if entry.is_dir())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _refusal(events / group, error) from error
    for name in names:
        content = read_text(f"{events}/{group}/{name}/format")
        if content is not None:
            formats[name] = parse_format(content)
    return formats


def _find_events(root: Path) -> Path | None:
    refused = None
    for mount_point in MOUNT_POINTS:
        events = root / mount_point / "events"
        try:
            events.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            refused = _refusal(events, error)
            continue
        return events
    if refused is not None:
        raise refused
    return None


def parse_format(content: str) -> EventFormat:
    """Parse an event's ``format`` file.

    Raises:
        KernelInterfaceError: name or ID is missing.
    """
    name = re.search(r"^name: (\S+)$", content, re.MULTILINE)
    number = re.search(r"^ID: (\d+)$", content, re.MULTILINE)
    if name is None or number is None:
        raise KernelInterfaceError(f"an event's format has no name or ID: {content[:60]!r}")
    fields = tuple(
        FormatField(
            name=match["name"],
            c_type=(match["type"].strip() + (match["array"] or "")),
            offset=int(match["offset"]),
            size=int(match["size"]),
            signed=match["signed"] == "1",
        )
        for match in _FIELD.finditer(content)
        if not match["name"].startswith("common_")
    )
    return EventFormat(name[1], int(number[1]), fields)


def _refusal(path: Path, error: OSError) -> PrivilegeMissing | KernelInterfaceError:
    code = errno.errorcode.get(error.errno or 0, str(error.errno))
    if isinstance(error, PermissionError):
        return PrivilegeMissing(f"{path} cannot be read: {code}", "run as root")
    return KernelInterfaceError(f"{path} cannot be read: {code}")
