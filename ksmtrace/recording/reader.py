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
    time_of,
)
from ksmtrace.units import text_duration

# Before every message of an Arrow stream, the first of which holds the header.
_STREAM_BEGIN = b"\xff\xff\xff\xff"

# What Arrow, JSON and the items' constructors raise for bytes that nobody wrote.
_UNDECODABLE = (
    *(pa.ArrowException, OSError, MemoryError, ArithmeticError),
    *(ValueError, TypeError, LookupError, AttributeError),
)


class RecordingReader:
    """One recording, read as a stream.

    Iterating yields the items up to where the file ends or is damaged; :attr:`cut_off` then says
    whether that was before its trailer, and why that is believed. A batch is yielded only after
    the checksum that follows it was found right, except the last one of a file that ends early,
    which has none.

    Attributes:
        header: what was true before the first event.
        cut_off: None while unread or complete, else one sentence about "it", the recording, that
            says why it is incomplete.

    Raises:
        RecordingError: the file cannot be opened.
        ForeignRecording: the file is no recording.
        UnsupportedFormat: a newer ksmtrace wrote it.
        DamagedRecording: the file's header does not decode.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut_off: str | None = None
        self._gathering: Gathering | None = None
        try:
            self._content = path.read_bytes() if path.stat().st_size == 0 else _mapped(path)
        except OSError as error:
            why = "it is no regular file" if error.strerror is None else error.strerror
            raise RecordingError(
                f"{path} cannot be read: {why}",
                "a recording is one file, which `ksmtrace record` made, and its owner's only",
            ) from error
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
            raise DamagedRecording(
                f"{path} is damaged: its header does not decode",
                "the file was changed after it was written, or its disk failed: restore it from a "
                "copy",
            ) from error

    def __iter__(self) -> Iterator[Item]:
        """Yield the items in order."""
        held: list[Item] = []
        self._gathering = None
        told_ns = self.header.started_ns
        crc = 0
        checked = 0
        ended = damaged = False
        while not damaged:
            position = self._source.tell()
            try:
                batch, metadata = self._reader.read_next_batch_with_custom_metadata()
            except StopIteration:
                break
            except _UNDECODABLE:
                # Of a block that was cut off, Arrow has read all there is.
                left = len(self._content) - position
                damaged = self._source.tell() < len(self._content) or left > MESSAGE_BYTES
                if not damaged:
                    where = f"the file ends in the middle of a block (byte {position:,})"
                    self.cut_off = f"it was cut off: {where}"
                break
            # The first batch is written together with the header, so none is before it.
            if metadata is None or metadata.get(CRC_KEY) != str(crc).encode():
                damaged = True
                break
            begin, checked = checked, self._source.tell()
            crc = zlib.crc32(self._content[begin:checked], crc)
            # The trailer counts once the seal that the writer puts behind it has confirmed it.
            ended = ended or any(isinstance(item, Trailer) for item in held)
            told_ns = max([told_ns, *map(time_of, held)])
            yield from held
            held = []
            try:
                held = list(self._items(batch))
            except _UNDECODABLE:
                damaged = True
        if damaged:
            # What no checksum has confirmed may be what is damaged.
            self.cut_off = (
                f"it is damaged before or at byte {position:,} of {len(self._content):,}: read up "
                f"to {text_duration(told_ns - self.header.started_ns)}, and nothing after that"
            )
        else:
            yield from held
        if ended:
            self.cut_off = None
        elif self.cut_off is None:
            self.cut_off = "it was cut off: the file ends before its trailer"

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
            return ForeignRecording(
                f"{self.path} is empty",
                "nothing was recorded, or it was cut off before its header: record again",
            )
        begins_as_one = bytes(self._content[: len(_STREAM_BEGIN)]) == _STREAM_BEGIN
        or_cut_off = ", or was cut off in its header" if begins_as_one else ""
        return ForeignRecording(
            f"{self.path} is no ksmtrace recording{or_cut_off}",
            "make one with `ksmtrace record -o FILE`",
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
