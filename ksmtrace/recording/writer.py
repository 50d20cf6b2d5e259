"""Writes a stream to a recording file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from ksmtrace.errors import CannotRun
from ksmtrace.events import KINDS, Events, concatenate
from ksmtrace.recording import witness
from ksmtrace.recording.format import (
    BATCH_EVENTS,
    COLUMNS,
    CRC_KEY,
    FORMAT_VERSION,
    HEADER_KEY,
    KINDS_KEY,
    VERSION_KEY,
    to_planes,
)
from ksmtrace.recording.output import create
from ksmtrace.stream import Batch, Header, Item, Witnessed

_NO_EVENTS = pa.nulls(1, pa.large_binary())
_NO_NOTE = pa.nulls(1, pa.string())


class RecordingWriter:
    """One recording file, open for appending items.

    Events are gathered and written in batches; :meth:`flush` writes what is gathered. What has
    been written can be read whatever happens to this process.

    Args:
        path: the file; created with mode 0600.
        header: what was true before the first event.
        force: overwrite an existing regular file.

    Attributes:
        written_events: how many events the file holds so far.

    Raises:
        UsageError: the file exists and ``force`` is off, or its directory does not exist.
        CannotRun: the file cannot be created or written, for example because the disk is full.
    """

    def __init__(self, path: Path, header: Header, force: bool = False) -> None:
        self.path = path
        self._file = _RecordingFile(path, force)
        self._gathered: list[Events] = []
        self._gathered_events = 0
        self.written_events = 0
        metadata: dict[bytes | str, bytes | str] = {
            VERSION_KEY: str(FORMAT_VERSION),
            HEADER_KEY: _json(dataclasses.asdict(header)),
            KINDS_KEY: _json([dataclasses.asdict(kind) for kind in KINDS]),
        }
        self._schema = pa.schema(COLUMNS, metadata=metadata)
        self._writer = pa.ipc.new_stream(
            pa.PythonFile(self._file, mode="w"),
            self._schema,
            # Without threads: there is one column to compress.
            options=pa.ipc.IpcWriteOptions(
                compression=pa.Codec("zstd", compression_level=1), use_threads=False
            ),
        )
        # Arrow writes the header with the first batch: an empty one puts it on disk now.
        self._write(_NO_EVENTS[:0], _NO_NOTE[:0])

    @property
    def written_bytes(self) -> int:
        """Size of the file so far."""
        return self._file.position

    def write(self, item: Item) -> None:
        """Append one item.

        Raises:
            CannotRun: the file cannot be written; what was written before stays readable.
        """
        if isinstance(item, Batch):
            self._gathered.append(item.events)
            self._gathered_events += len(item.events)
            if self._gathered_events >= BATCH_EVENTS:
                self.flush()
            return
        # An item stands behind the events that came before it.
        self.flush()
        if isinstance(item, Witnessed):
            notes = witness.iter_notes(item)
        else:
            notes = iter([{"type": type(item).__name__, **dataclasses.asdict(item)}])
        for note in notes:
            self._write(_NO_EVENTS, _one(pa.string(), np.int32, _json(note).encode()))

    def flush(self) -> None:
        """Write the gathered events."""
        if not self._gathered_events:
            return
        events = self._gathered[0] if len(self._gathered) == 1 else concatenate(self._gathered)
        self._gathered = []
        self._gathered_events = 0
        for begin in range(0, len(events), BATCH_EVENTS):
            part = events[begin : begin + BATCH_EVENTS]
            planes = to_planes(part)
            self._write(_one(pa.large_binary(), np.int64, planes.data), _NO_NOTE)
            self.written_events += len(part)

    def close(self) -> None:
        """Write what is gathered, seal the file with its checksum, and close it."""
        self.flush()
        self._write(_NO_EVENTS[:0], _NO_NOTE[:0])
        try:
            self._writer.close()
            self._file.commit(sync=True)
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file where it stands, after an error; its readable part ends there."""
        self._file.close()

    def __enter__(self) -> RecordingWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Seal the file, or leave it as it stands where an error ended the block."""
        if error is None:
            self.close()
        else:
            self.abandon()

    def _write(self, events: pa.Array[Any], note: pa.Array[Any]) -> None:
        batch = pa.record_batch([events, note], schema=self._schema)
        self._writer.write_batch(batch, custom_metadata={CRC_KEY: str(self._file.crc).encode()})
        self._file.commit()


class _RecordingFile(io.RawIOBase):
    """The file beneath the Arrow stream: whole messages only, with a running CRC."""

    _fd = -1

    def __init__(self, path: Path, force: bool) -> None:
        self._fd = create(path, force)
        self._path = path
        self._message = bytearray()
        self.position = 0
        self.crc = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, content: Any) -> int:
        """Gather a piece of a message (called by Arrow)."""
        self._message += content
        return len(content)

    def commit(self, sync: bool = False) -> None:
        """Write the gathered message; on failure cut the file back to the last whole one."""
        view = memoryview(self._message)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            if sync:
                os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.position)
            kept = f"its first {self.position} bytes are an incomplete but readable recording"
            raise CannotRun(
                f"{self._path} cannot be written: {error.strerror}",
                kept if self.position else "choose another place with -o",
            ) from error
        self.position += len(self._message)
        self.crc = zlib.crc32(self._message, self.crc)
        self._message = bytearray()

    def close(self) -> None:
        """Close the file descriptor."""
        # Also called when an object that never got its file is collected.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        super().close()


def _one(kind: pa.DataType, offset: type[np.signedinteger[Any]], content: Any) -> pa.Array[Any]:
    """Make an array of one value, without a copy of its bytes.

    pa.array() would import pandas, which takes a second or more in which nobody empties the ring.
    """
    bounds = np.array([0, len(memoryview(content).cast("B"))], offset)
    buffers = [None, pa.py_buffer(bounds.data), pa.py_buffer(content)]
    return pa.Array.from_buffers(kind, 1, buffers)


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))
