import contextlib
import dataclasses
import errno
import functools
import gc
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksmtrace.analysis.recorded import gather
from ksmtrace.analysis.report import make_report
from ksmtrace.errors import (
    CannotRun,
    DamagedRecording,
    ForeignRecording,
    RecordingError,
    UnsupportedFormat,
    UsageError,
)
from ksmtrace.events import EVENT_DTYPE, KINDS, PAYLOAD_BYTES
from ksmtrace.recording.format import BATCH_EVENTS, FORMAT_VERSION, KINDS_KEY, VERSION_KEY
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.recording.witness import iter_notes
from ksmtrace.recording.writer import RecordingWriter
from ksmtrace.stream import Batch, CounterSample, Header, Losses, ProcessSeen, Trailer, Witnessed

GOLDENS = Path(__file__).parents[1] / "golden" / "recordings"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.ksmt"))

HEADER = Header("0", ["ksmtrace", "record"], 1, 2, {"kernel": {}}, [], [["a", "b", "c"]], {})
SAMPLE = CounterSample(
    5, 9, {"run": 1, "general_profit": -64, "advisor_mode": "none", "x": None}, {"cow_ksm": None},
    {"cpu_ns": 1 << 60}, {4: {"ksm_merging_pages": 3, "ksm_mergeable": "yes"}, 70000: {}},
)  # fmt: skip
SEEN = ProcessSeen(3, 4, 1 << 62, 1, 'né\n"q', "/a/b", None, "proc")
NAMELESS = ProcessSeen(3, 5, None, None, None, None, "guest-1", "event")
LOSSES = Losses(6, {"ksm_enter": 7}, {"ksm_enter": 2})
COUNTED = Losses(
    7, {}, {}, {"cmp_and_merge_page": 1 << 60}, {"search_nodes": [0, 5]}, {"break_ksm": [3, None]}
)
TRAILER = Trailer(8, {"ksm_enter": 5}, "interrupted", -11, ["a notice"])


def make_events(count: int, seed: int = 0) -> np.ndarray:
    """Make payloads of random bytes: a recording keeps all of them, whatever they mean."""
    return np.frombuffer(
        np.random.default_rng(seed).bytes(count * PAYLOAD_BYTES), EVENT_DTYPE
    ).copy()


def write(path: Path, items, header: Header = HEADER) -> Path:
    with RecordingWriter(path, header) as writer:
        for item in items:
            writer.write(item)
    return path


def plain(items) -> list:
    """Make items comparable: events as bytes, neighbouring batches joined."""
    flat: list = []
    for item in items:
        if isinstance(item, Witnessed):
            flat.append(list(iter_notes(item)))
        elif not isinstance(item, Batch):
            flat.append(item)
        elif flat and isinstance(flat[-1], bytes):
            flat[-1] += item.events.tobytes()
        elif len(item.events):
            flat.append(item.events.tobytes())
    return flat


def is_prefix(part: list, whole: list) -> bool:
    if not part:
        return True
    *full, last = part
    if full != whole[: len(full)] or len(part) > len(whole):
        return False
    following = whole[len(full)]
    if isinstance(last, bytes) and isinstance(following, bytes):
        return following.startswith(last)
    return last == following


def read_what_there_is(path: Path) -> tuple[list, str | None, RecordingError | None]:
    """Read items, why the file is cut off, and the error that ended it."""
    items: list = []
    try:
        reader = RecordingReader(path)
        for item in reader:
            items.append(item)
    except RecordingError as error:
        return items, None, error
    return items, reader.cut_off, None


@functools.cache
def golden_items(name: str) -> list:
    return plain(RecordingReader(GOLDENS / f"{name}.ksmt"))


def boundaries(path: Path) -> list[int]:
    """List where the Arrow messages of a file begin, and its end."""
    source = pa.BufferReader(path.read_bytes())
    reader = pa.ipc.open_stream(source)
    places = [source.tell()]
    with contextlib.suppress(StopIteration):
        while True:
            reader.read_next_batch()
            places.append(source.tell())
    return places


@pytest.fixture(scope="module")
def reduced(tmp_path_factory) -> Path:
    """A real recording with few items left: every byte of it can be tried."""
    reader = RecordingReader(GOLDENS / "lifetime.ksmt")
    kept = {type(item): item for item in reader}
    kept[Batch] = Batch(kept[Batch].events[:20])
    path = tmp_path_factory.mktemp("reduced") / "reduced.ksmt"
    order = (CounterSample, Batch, Trailer)
    return write(path, [kept[kind] for kind in order], reader.header)


# --- what is written comes back


@pytest.mark.parametrize("item", [SAMPLE, SEEN, NAMELESS, LOSSES, COUNTED, TRAILER])
def test_every_kind_of_item_comes_back(tmp_path, item):
    reader = RecordingReader(write(tmp_path / "f", [item]))
    assert list(reader) == [item]
    assert reader.header == HEADER
    assert (reader.cut_off is None) == isinstance(item, Trailer)


@pytest.mark.parametrize(
    "count", [0, 1, 1023, 1024, 1025, BATCH_EVENTS - 1, BATCH_EVENTS, BATCH_EVENTS + 1]
)
def test_batches_of_every_size_come_back(tmp_path, count):
    events = make_events(count)
    items = list(RecordingReader(write(tmp_path / "f", [Batch(events), TRAILER])))
    assert plain(items) == plain([Batch(events), TRAILER])
    assert all(item.events.dtype == EVENT_DTYPE for item in items if isinstance(item, Batch))


ITEMS = st.one_of(
    st.sampled_from([SAMPLE, SEEN, NAMELESS, LOSSES, COUNTED]),
    st.tuples(st.integers(0, 300), st.integers(0, 9)).map(lambda made: Batch(make_events(*made))),
    st.builds(
        ProcessSeen,
        ts_ns=st.integers(0, 2**63),
        pid=st.integers(1, 2**22),
        start_ns=st.none() | st.integers(0, 2**63),
        ppid=st.none() | st.integers(0, 2**22),
        comm=st.none() | st.text(max_size=16),
        cgroup=st.none() | st.text(max_size=40),
        guest=st.none() | st.text(max_size=20),
        source=st.sampled_from(["proc", "connector", "event"]),
    ),
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(items=st.lists(ITEMS, max_size=15))
def test_any_sequence_comes_back_equal_and_in_order(tmp_path, items):
    path = tmp_path / "f"
    path.unlink(missing_ok=True)
    assert plain(RecordingReader(write(path, [*items, TRAILER]))) == plain([*items, TRAILER])


def test_events_before_an_item_are_readable_as_soon_as_the_item_is_written(tmp_path):
    path = tmp_path / "f"
    writer = RecordingWriter(path, HEADER)
    writer.write(Batch(make_events(5)))
    writer.write(LOSSES)
    items, cut_off, error = read_what_there_is(path)
    assert plain(items) == plain([Batch(make_events(5)), LOSSES])
    assert cut_off == "the file ends before its trailer"
    assert error is None
    writer.abandon()


def test_the_header_is_readable_before_the_first_item(tmp_path):
    writer = RecordingWriter(tmp_path / "f", HEADER)
    assert RecordingReader(tmp_path / "f").header == HEADER
    assert writer.written_bytes == (tmp_path / "f").stat().st_size
    writer.abandon()


@pytest.mark.parametrize("name", NAMES)
def test_copying_a_real_recording_gives_the_same_recording(tmp_path, name):
    reader = RecordingReader(GOLDENS / f"{name}.ksmt")
    copy = write(tmp_path / "f", reader, reader.header)
    assert plain(RecordingReader(copy)) == golden_items(name)
    assert RecordingReader(copy).header == reader.header


# --- files that are cut off


def check_prefix(path: Path, whole: list) -> bool:
    """Check what a prefix reads as; returns whether already its header was cut off."""
    items, cut_off, error = read_what_there_is(path)
    assert is_prefix(plain(items), whole)
    if error is None:
        assert cut_off is not None
    else:
        assert isinstance(error, ForeignRecording)  # the header itself is cut off
        assert error.exit_status == 5
        assert items == []
        size = path.stat().st_size
        assert ("cut off" in f"{error} {error.hint}") == (size == 0 or size > 3)
    return error is not None


def test_a_folder_is_no_recording(tmp_path):
    with pytest.raises(RecordingError, match="cannot be read: it is no regular file"):
        RecordingReader(tmp_path)


def test_every_prefix_of_a_recording_reads_up_to_the_cut(tmp_path, reduced):
    whole = plain(RecordingReader(reduced))
    header_end, *_, last_message_end = boundaries(reduced)
    path = Path(shutil.copy(reduced, tmp_path / "f"))
    for size in range(last_message_end - 1, -1, -1):
        os.truncate(path, size)
        assert check_prefix(path, whole) == (size < header_end)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"killed"}))
def test_a_real_recording_cut_around_each_block_reads_up_to_the_cut(tmp_path, name):
    original = GOLDENS / f"{name}.ksmt"
    places = boundaries(original)
    trailer_end = places[-1]
    sizes = {place + step for place in places for step in (-8, -1, 0, 1, 4, 8, 9)}
    sizes |= set(range(places[0], trailer_end, 997))
    path = Path(shutil.copy(original, tmp_path / "f"))
    previous = -1
    for size in sorted(size for size in sizes if size < places[-2]):
        path.write_bytes(original.read_bytes()[:size])
        check_prefix(path, golden_items(name))
        length = sum(map(len, (read_what_there_is(path)[0],)))
        assert length >= previous  # more bytes never read as less
        previous = length


def test_the_report_of_a_cut_recording_says_that_and_why(tmp_path, reduced):
    places = boundaries(reduced)
    path = Path(shutil.copy(reduced, tmp_path / "f"))
    for size in (places[1], places[2] + 100, places[-2] - 1):
        path.write_bytes(reduced.read_bytes()[:size])
        report = make_report(gather(RecordingReader(path)))
        assert report["complete"] is False
        assert report["incomplete_because"][0].startswith("it was cut off: the file ends")


def test_a_file_that_lacks_only_arrows_end_mark_is_complete(tmp_path, reduced):
    path = Path(shutil.copy(reduced, tmp_path / "f"))
    os.truncate(path, boundaries(reduced)[-1])
    items, cut_off, error = read_what_there_is(path)
    assert isinstance(items[-1], Trailer)
    assert (cut_off, error) == (None, None)


# --- files that are damaged


def test_no_flipped_bit_changes_the_result_silently(tmp_path, reduced):
    whole = plain(RecordingReader(reduced))
    header = RecordingReader(reduced).header
    content = bytearray(reduced.read_bytes())
    first = boundaries(reduced)[0]
    path = tmp_path / "f"
    places = [*range(0, first, 211), *range(first, len(content), 17)]
    for place in places:
        flipped = content.copy()
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        items, cut_off, error = read_what_there_is(path)
        assert is_prefix(plain(items), whole), place
        if error is None and cut_off is None:
            assert plain(items) == whole, place
            assert RecordingReader(path).header == header, place


def test_a_block_that_is_lost_from_the_middle_is_damage(tmp_path, reduced):
    content = reduced.read_bytes()
    _, _, begin, end, *_ = boundaries(reduced)
    path = tmp_path / "f"
    path.write_bytes(content[:begin] + content[end:])
    items, _, error = read_what_there_is(path)
    assert isinstance(error, DamagedRecording)
    assert is_prefix(plain(items), plain(RecordingReader(reduced)))


def test_a_flipped_bit_in_a_block_is_damage_and_not_a_cut(tmp_path, reduced):
    begin, end = boundaries(reduced)[1:3]
    head = 16 + 29 * 40 + 400  # the message's own description, where a length may be what changed
    path = tmp_path / "f"
    for place in range(begin + head, end, 13):
        content = bytearray(reduced.read_bytes())
        content[place] ^= 16
        path.write_bytes(content)
        assert isinstance(read_what_there_is(path)[2], DamagedRecording), place


def test_the_message_of_damage_is_one_line_with_a_hint(tmp_path, reduced):
    content = bytearray(reduced.read_bytes())
    content[boundaries(reduced)[1] + 900] ^= 255
    path = tmp_path / "f"
    path.write_bytes(content)
    _, _, error = read_what_there_is(path)
    assert isinstance(error, DamagedRecording)
    assert "\n" not in str(error) and error.hint and "\n" not in error.hint
    assert str(path) in str(error)


# --- files that are no recordings


def png() -> bytes:
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(100)


def other_arrow_stream() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"a": [1, 2, 3]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


FOREIGN = {
    "png": png(),
    "empty": b"",
    "one byte": b"\xff",
    "zeros": bytes(5000),
    "arrow": other_arrow_stream(),
    "text": b"hello\n",
    "huge claim": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(100),
    "negative claim": b"\xff\xff\xff\xff\xff\xff\xff\xff" + bytes(100),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, name):
    path = tmp_path / "f"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(ForeignRecording) as caught:
        RecordingReader(path)
    assert caught.value.exit_status == 5
    assert "\n" not in str(caught.value)


def test_what_cannot_be_opened_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RecordingError) as caught:
            RecordingReader(path)
        assert caught.value.exit_status == 5
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "0", "x", ""])
def test_an_unknown_format_version_is_refused(tmp_path, version):
    original = pa.ipc.open_stream((GOLDENS / "crash.ksmt").read_bytes())
    metadata = {**original.schema.metadata, VERSION_KEY: version.encode()}
    path = tmp_path / "f"
    with pa.OSFile(str(path), "wb") as sink:
        pa.ipc.new_stream(sink, original.schema.with_metadata(metadata)).close()
    with pytest.raises(UnsupportedFormat) as caught:
        RecordingReader(path)
    assert f"version {version}" in str(caught.value)
    assert caught.value.exit_status == 5


def test_a_header_without_its_fields_is_damage(tmp_path):
    schema = pa.schema(
        [("a", pa.int8())],
        metadata={VERSION_KEY: str(FORMAT_VERSION), b"ksmtrace_header": b'{"version": "0"}'},
    )
    path = tmp_path / "f"
    with pa.OSFile(str(path), "wb") as sink:
        pa.ipc.new_stream(sink, schema).close()
    with pytest.raises(DamagedRecording):
        RecordingReader(path)


# --- creating the file


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_file_is_its_owners_only(tmp_path):
    before = os.umask(0)
    try:
        assert mode(write(tmp_path / "f", [TRAILER])) == 0o600
    finally:
        os.umask(before)


def test_an_existing_file_is_kept_without_force(tmp_path):
    path = tmp_path / "f"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists") as caught:
        RecordingWriter(path, HEADER)
    assert "--force" in (caught.value.hint or "")
    assert path.read_text() == "precious"


def test_force_overwrites_and_makes_it_its_owners_only(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    path.chmod(0o644)
    with RecordingWriter(path, HEADER, force=True) as writer:
        writer.write(TRAILER)
    assert mode(path) == 0o600
    assert list(RecordingReader(path)) == [TRAILER]


@pytest.mark.parametrize("force", [False, True])
def test_a_symlink_is_never_followed(tmp_path, force):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "f").symlink_to(target)
    with pytest.raises(UsageError):
        RecordingWriter(tmp_path / "f", HEADER, force)
    assert target.read_text() == "precious"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "read fifo", "directory", "/dev/null"])
def test_what_is_no_regular_file_is_refused_and_left_alone(tmp_path, kind, force):
    path = Path(kind) if kind.startswith("/") else tmp_path / kind
    with contextlib.ExitStack() as stack:
        if kind.endswith("fifo"):
            os.mkfifo(path)
            if kind == "read fifo":
                stack.callback(os.close, os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        elif kind == "directory":
            path.mkdir()
        before = path.stat()
        with pytest.raises(UsageError) as caught:
            RecordingWriter(path, HEADER, force)
        assert "\n" not in str(caught.value)
        assert path.stat().st_mode == before.st_mode


def test_a_missing_directory_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="No such file or directory"):
        RecordingWriter(tmp_path / "absent" / "f", HEADER)


def test_a_refused_output_closes_its_descriptor_once():
    with pytest.raises(UsageError) as refused:
        RecordingWriter(Path("/dev/null"), HEADER, force=True)
    # One of these gets the number that the refused file had, and must keep it.
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    del refused
    gc.collect()
    for fd in fds:
        os.close(fd)


def test_a_failed_write_keeps_what_was_written_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "f"
    writer = RecordingWriter(path, HEADER)
    writer.write(Batch(make_events(7)))
    writer.write(LOSSES)
    writer.write(Batch(make_events(5)))
    size = path.stat().st_size
    real_write = os.write
    allowed = 100

    def full_disk(fd, content):
        nonlocal allowed
        if not allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real_write(fd, content[:allowed])
        allowed = 0
        return written

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(CannotRun, match="No space left on device") as caught:
        writer.write(SAMPLE)
    writer.abandon()
    monkeypatch.undo()
    assert path.stat().st_size == size
    assert f"first {size} bytes" in (caught.value.hint or "")
    (batch, *items), cut_off, error = read_what_there_is(path)
    assert len(batch.events) == writer.written_events == 7
    assert (items, cut_off, error) == ([LOSSES], "the file ends before its trailer", None)


def test_an_error_inside_the_block_leaves_an_incomplete_file(tmp_path):
    with pytest.raises(ZeroDivisionError), RecordingWriter(tmp_path / "f", HEADER) as writer:
        writer.write(LOSSES)
        raise ZeroDivisionError
    assert read_what_there_is(tmp_path / "f") == (
        [LOSSES],
        "the file ends before its trailer",
        None,
    )


def test_every_field_of_the_header_comes_back(tmp_path):
    for field in dataclasses.fields(Header):
        assert getattr(RecordingReader(GOLDENS / "cow.ksmt").header, field.name) not in (None, "")
    changed = replace(HEADER, command_line=["ü", "", "a b"], settings={"ring_bytes": 1 << 40})
    write(tmp_path / "f", [TRAILER], changed)
    assert RecordingReader(tmp_path / "f").header == changed


def test_the_schema_names_the_kinds_so_that_others_can_read_the_file(tmp_path):
    write(tmp_path / "f", [TRAILER])
    metadata = pa.ipc.open_stream((tmp_path / "f").read_bytes()).schema.metadata
    assert metadata is not None
    named = [(kind["number"], kind["name"]) for kind in json.loads(metadata[KINDS_KEY])]
    assert named == [(kind.number, kind.name) for kind in KINDS]


def test_a_recording_made_before_counts_were_kept_has_none():
    losses = [item for item in RecordingReader(GOLDENS / "cow.ksmt") if isinstance(item, Losses)]
    assert losses
    assert {(*item.counted, *item.histograms, *item.calls) for item in losses} == {()}


def test_writing_imports_nothing_that_takes_long(recordings, tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from ksmtrace.recording.reader import RecordingReader\n"
        "from ksmtrace.recording.writer import RecordingWriter\n"
        "reader = RecordingReader(Path(sys.argv[1]))\n"
        "before = set(sys.modules)\n"
        "with RecordingWriter(Path(sys.argv[2]), reader.header) as writer:\n"
        "    for item in reader: writer.write(item)\n"
        "sys.exit(' '.join(set(sys.modules) - before))\n"
    )
    command = [sys.executable, "-c", program]
    command += [str(recordings / "guest-6.12-witnessed.ksmt"), str(tmp_path / "copy.ksmt")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.stderr.strip() == ""
