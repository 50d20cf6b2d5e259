"""Reads a recording back as the stream it was written from."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ksmtrace.errors import DamagedRecording, ForeignRecording, RecordingError, UnsupportedFormat
from ksmtrace.recording.format import (
    CRC_KEY,
    EVENTS,
    HEADER_KEY,
    MESSAGE_BYTES,
    NOTE,
    READABLE_VERSIONS,
    VERSION_KEY,
    from_planes,
)
from ksmtrace.recording.witness import ROWS_NOTE, Gathering
from ksmtrace.stream import (
    Batch,
    CounterSample,
    Header,
    Item,
    Losses,
    ProcessSeen,
    StackSeen,
    Trailer,
    Witnessed,
)

# Before every message of an Arrow stream, the first of which holds the header.
_STREAM_BEGIN = b"\xff\xff\xff\xff"

# What Arrow, JSON and the items' constructors raise for bytes that nobody wrote.
_UNDECODABLE = (
    *(pa.ArrowException, OSError, MemoryError, ArithmeticError),
    *(ValueError, TypeError, LookupError, AttributeError),
)


class RecordingReader:
    """One recording, read as a stream.

    Iterating yields the items; :attr:`cut_off` then says whether the file ended before its
    trailer, and why that is believed. A batch is yielded only after the checksum that follows it
    was found right, except the last one of a file that was cut off, which has none.

    Attributes:
        header: what was true before the first event.
        cut_off: None while unread or complete, else why the recording is incomplete.

    Raises:
        RecordingError: the file cannot be opened.
        ForeignRecording: the file is no recording.
        UnsupportedFormat: a newer ksmtrace wrote it.
        DamagedRecording: the file's header, or (while iterating) a block, does not decode.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut_off: str | None = None
        self._gathering: Gathering | None = None
        try:
            self._content = path.read_bytes() if path.stat().st_size == 0 else _mapped(path)
        except OSError as error:
            why = "it is no regular file" if error.strerror is None else error.strerror
            raise RecordingError(f"{path} cannot be read: {why}") from error
        self._source = pa.BufferReader(self._content)
        try:
            # Threads would take longer to start than one of our messages takes to decode.
            self._reader = pa.ipc.open_stream(
                self._source, options=pa.ipc.IpcReadOptions(use_threads=False)
            )
            metadata = self._reader.schema.metadata or {}
        except _UNDECODABLE:
            raise self._no_recording() from None
        if VERSION_KEY not in metadata:
            raise self._no_recording()
        version = metadata[VERSION_KEY].decode(errors="replace")
        if version not in READABLE_VERSIONS:
            raise UnsupportedFormat(
                f"{path} has format version {version}, this ksmtrace reads "
                f"{' and '.join(READABLE_VERSIONS)}",
                "read it with the ksmtrace that wrote it, or a newer one",
            )
        try:
            self.header = Header(**json.loads(metadata[HEADER_KEY]))
        except _UNDECODABLE as error:
            raise DamagedRecording(f"{path} is damaged: its header does not decode") from error

    def __iter__(self) -> Iterator[Item]:
        """Yield the items in order.

        Raises:
            DamagedRecording: a block does not decode or its checksum is wrong.
        """
        held: list[Item] = []
        self._gathering = None
        crc = 0
        checked = 0
        ended = False
        while True:
            position = self._source.tell()
            try:
                batch, metadata = self._reader.read_next_batch_with_custom_metadata()
            except StopIteration:
                break
            except _UNDECODABLE as error:
                # Of a block that was cut off, Arrow has read all there is.
                left = len(self._content) - position
                if self._source.tell() < len(self._content) or left > MESSAGE_BYTES:
                    raise self._damaged(position) from error
                self.cut_off = f"the file ends in the middle of a block (byte {position})"
                break
            # The first batch is written together with the header, so none is before it.
            if metadata is None or metadata.get(CRC_KEY) != str(crc).encode():
                raise self._damaged(position)
            begin, checked = checked, self._source.tell()
            crc = zlib.crc32(self._content[begin:checked], crc)
            # The trailer counts once the seal that the writer puts behind it has confirmed it.
            ended = ended or any(isinstance(item, Trailer) for item in held)
            yield from held
            held = []
            try:
                held = list(self._items(batch))
            except _UNDECODABLE as error:
                raise self._damaged(position) from error
        yield from held
        if not ended and self.cut_off is None:
            self.cut_off = "the file ends before its trailer"

    def _items(self, batch: pa.RecordBatch) -> Iterator[Item]:
        """Yield the items of one record batch: a run of events, or one note per row."""
        batch.validate(full=True)  # Arrow trusts offsets that it has read until told not to
        for events, note in zip(batch.column(EVENTS), batch.column(NOTE), strict=True):
            if events.is_valid:
                yield Batch(from_planes(memoryview(events.as_buffer())))
            if note.is_valid:
                yield from self._take_note(json.loads(note.as_py()))

    def _take_note(self, fields: dict[str, Any]) -> Iterator[Item]:
        if fields["type"] == Witnessed.__name__:
            self._gathering = Gathering(fields)
        elif fields["type"] == ROWS_NOTE and self._gathering is not None:
            self._gathering.add(fields)
        else:
            yield _from_note(fields)
            return
        whole = self._gathering.whole()
        if whole is not None:
            self._gathering = None
            yield whole

    def _no_recording(self) -> RecordingError:
        if len(self._content) == 0:
            return ForeignRecording(f"{self.path} is empty", "it was cut off before its header")
        begins_as_one = bytes(self._content[: len(_STREAM_BEGIN)]) == _STREAM_BEGIN
        or_cut_off = ", or was cut off in its header" if begins_as_one else ""
        return ForeignRecording(
            f"{self.path} is no ksmtrace recording{or_cut_off}",
            "make one with `ksmtrace record -o FILE`",
        )

    def _damaged(self, position: int) -> DamagedRecording:
        return DamagedRecording(
            f"{self.path} is damaged before or at byte {position}",
            "the file was changed after it was written, or its disk failed; restore it from a copy",
        )


def _mapped(path: Path) -> memoryview:
    with pa.memory_map(str(path)) as mapped:
        return memoryview(mapped.read_buffer())


def _from_note(fields: dict[str, Any]) -> Item:
    kind = fields.pop("type")
    if kind == "CounterSample":
        # JSON has only string keys.
        fields["processes"] = {int(pid): stat for pid, stat in fields["processes"].items()}
    return _NOTES[kind](**fields)


_NOTES: dict[str, Callable[..., Item]] = {
    note.__name__: note for note in (CounterSample, ProcessSeen, StackSeen, Losses, Trailer)
}
