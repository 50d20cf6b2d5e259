"""Writes a stream to a recording file."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import stat
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from ksmtrace.errors import CannotRun, UsageError
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

    Raises:
        UsageError: the file exists and ``force`` is off, or its directory does not exist.
        CannotRun: the file cannot be created or written, for example because the disk is full.
    """

    def __init__(self, path: Path, header: Header, force: bool = False) -> None:
        self.path = path
        self._file = _RecordingFile(path, force)
        self._gathered: list[Events] = []
        self._gathered_events = 0
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
            self._write(_NO_EVENTS, pa.array([_json(note)]))

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
            bounds = np.array([0, planes.nbytes], np.int64)
            buffers = [None, pa.py_buffer(bounds.data), pa.py_buffer(planes.data)]
            # One value of all the bytes, without a copy of them.
            self._write(pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers), _NO_NOTE)

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
        # O_NONBLOCK: else opening a FIFO would wait for its reader.
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        flags |= os.O_TRUNC if force else os.O_EXCL
        try:
            fd = os.open(path, flags, 0o600)
        except FileExistsError:
            raise UsageError(
                f"{path} exists", "choose another name, or overwrite it with --force"
            ) from None
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise _not_a_file(path) from None
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
                raise UsageError(f"{path}: {error.strerror}") from error
            raise CannotRun(f"{path} cannot be created: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise _not_a_file(path)
        self._fd = fd
        os.fchmod(fd, 0o600)  # with force the file may have had another mode
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


def _not_a_file(path: Path) -> UsageError:
    return UsageError(f"{path} is no regular file", "choose another name")


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))
