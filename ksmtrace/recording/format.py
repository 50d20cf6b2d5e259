"""What the recording's writer and reader agree on. See docs/recording-format.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ksmtrace.events import EVENT_DTYPE, PAYLOAD_BYTES, Events

FORMAT_VERSION = 3
"""Bumped with every change that an older reader would misread.

2: readings of the witnesses, and more in Losses. Version 1 reads as a 2 without them.
3: stacks. Version 2 reads as a 3 without them.
"""

READABLE_VERSIONS = ("1", "2", "3")

SUFFIX = ".ksmt"

VERSION_KEY = b"ksmtrace_format"
HEADER_KEY = b"ksmtrace_header"
KINDS_KEY = b"ksmtrace_kinds"
CRC_KEY = b"crc32_before"

PLANES = PAYLOAD_BYTES // 2
PLANE_DTYPE = np.dtype("<u2")

# The payloads of a batch are transposed to planes of 16 bits: most of a field's high bits do not
# change from event to event, and cost next to nothing to compress. One column holds all planes:
# with a column each, a note would take six times the space.
EVENTS = "events"
NOTE = "note"
COLUMNS: list[pa.Field[Any]] = [pa.field(EVENTS, pa.large_binary()), pa.field(NOTE, pa.string())]

BATCH_EVENTS = 1 << 16
"""Events in one record batch, at most."""

MESSAGE_BYTES = 8 << 20
"""No message of a recording is longer; a file that claims so is damaged, not cut off."""

_BLOCK_EVENTS = 1024  # a block and its transpose fit the CPU's cache: three times as fast


def to_planes(events: Events) -> npt.NDArray[np.uint16]:
    """Transpose events, shape (n,), to their planes, shape (PLANES, n)."""
    rows = np.ascontiguousarray(events).view(PLANE_DTYPE).reshape(len(events), PLANES)
    planes = np.empty((PLANES, len(events)), PLANE_DTYPE)
    for begin in range(0, len(events), _BLOCK_EVENTS):
        block = slice(begin, begin + _BLOCK_EVENTS)
        planes[:, block] = rows[block].T
    return planes


def from_planes(content: memoryview) -> Events:
    """Transpose the bytes of PLANES planes of equal length back to events, shape (n,).

    Raises:
        ValueError: the bytes are not a whole number of payloads.
    """
    planes = np.frombuffer(content, PLANE_DTYPE).reshape(PLANES, -1)
    rows = np.empty((planes.shape[1], PLANES), PLANE_DTYPE)
    for begin in range(0, len(rows), _BLOCK_EVENTS):
        block = slice(begin, begin + _BLOCK_EVENTS)
        rows[block] = planes[:, block].T
    return rows.reshape(-1).view(EVENT_DTYPE)
