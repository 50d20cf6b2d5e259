"""``ksmtrace record``."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksmtrace.cli.options import Seconds, Size, without_option
from ksmtrace.errors import KsmtraceError, UsageError
from ksmtrace.units import text_bytes, text_count, text_duration, text_signal

if TYPE_CHECKING:
    from types import FrameType

    from ksmtrace.capture.session import Capture
    from ksmtrace.recording.writer import RecordingWriter
    from ksmtrace.stream import Witnessed

_STOPPING = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "stopped by SIGTERM",
    signal.SIGHUP: "stopped by SIGHUP",
}
_PROGRESS_S = 0.5
_COMMAND_GRACE_S = 5.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The file; default ksmtrace-TIME.ksmt."
)
@click.option("-d", "--duration", type=Seconds(min=0), help="End after this many seconds.")
@click.option("-f", "--force", is_flag=True, help="Overwrite FILE.")
@click.option(
    "--interval",
    type=Seconds(min=0.01),
    default=1.0,
    show_default=True,
    help="Seconds between samples of the kernel's counters.",
)
@click.option(
    "--ring",
    type=Size(),
    default="16M",
    show_default=True,
    help="Size of the event ring: a power of two.",
)
@click.option(
    "--every-page",
    is_flag=True,
    help="Also an event for every page that ksmd looks at, which is only counted otherwise.",
)
@click.option(
    "--snapshot/--no-snapshot",
    default=True,
    show_default=True,
    help="Read at the start which pages are merged already, where kernel memory can be read and "
    "they are not too many.",
)
@click.option(
    "--witnesses",
    is_flag=True,
    help="Read at the start and at the end all that KSM holds, and what all mergeable memory maps: "
    "for `ksmtrace tree --verify`. SIGUSR1 has it read once more.",
)
@without_option
@click.option("-q", "--quiet", is_flag=True, help="No progress while recording.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON on stdout.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def record(
    output: Path | None,
    duration: float | None,
    force: bool,
    interval: float,
    ring: int,
    every_page: bool,
    snapshot: bool,
    witnesses: bool,
    without: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    command: tuple[str, ...],
) -> int:
    """Record what KSM does, until CMD ends, the time is up, or Ctrl-C.

    Nothing about KSM is changed: if ksmd is stopped (/sys/kernel/mm/ksm/run is 0), little happens.
    The recording holds kernel addresses and is readable by its owner only.

    \b
    Example:
      ksmtrace record -o host.ksmt -d 60
      ksmtrace record -o dup.ksmt -- ksmtrace workload duplicates
    """
    if command and shutil.which(command[0]) is None:
        raise UsageError(f"the command {command[0]!r} is not found", "give it after `--`")
    from ksmtrace.capture.plan import make_plan
    from ksmtrace.capture.session import Capture, CaptureSettings
    from ksmtrace.capture.sites import find_recipe
    from ksmtrace.kernel.facts import add_variables, read_facts
    from ksmtrace.recording.format import SUFFIX
    from ksmtrace.recording.writer import RecordingWriter

    path = output or Path(time.strftime(f"ksmtrace-%Y%m%d-%H%M%S{SUFFIX}"))
    facts = add_variables(read_facts()) if every_page else read_facts()
    plan = make_plan(facts, find_recipe(facts.kernel.build_id), every_page, without)
    run = _Run(command, duration, quiet, commands_stdout_to_stderr=as_json)
    settings = CaptureSettings(ring, int(interval * 1e9), snapshot, witnesses)
    with Capture(facts, plan, settings, run.until) as capture:
        writer = RecordingWriter(path, capture.header, force)
        # Only from here on: a signal during the set-up ends it at once, with nothing to keep.
        for number in _STOPPING:
            signal.signal(number, run.on_signal)
        signal.signal(signal.SIGUSR1, lambda *_: setattr(capture, "witnesses_wanted", True))
        failure = run.follow(capture, writer)
    summary = {
        "file": str(path),
        "events": writer.written_events,
        "lost": capture.progress.dropped,
        "duration_ns": run.ended_ns - capture.header.started_ns,
        "command_exit_status": run.command_exit_status,
        "reason": run.reason,
        "file_bytes": writer.written_bytes,
    }
    if as_json:
        click.echo(json.dumps(summary))
    else:
        click.echo(_summary_line(summary, run), err=True)
    if failure is not None:
        raise failure
    return 0


class _Run:
    """The recorded command, the time limit and the signals: when the recording ends, and why."""

    def __init__(
        self,
        command: tuple[str, ...],
        duration: float | None,
        quiet: bool,
        commands_stdout_to_stderr: bool,
    ) -> None:
        self.reason: str | None = None
        self.ended_ns = 0  # of the recording: detaching, and the command, may take longer
        self._command = command
        self._duration = duration
        self._quiet = quiet
        self._stdout = sys.stderr if commands_stdout_to_stderr else None
        self._signals: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._started_s: float | None = None
        self._harder_s = 0.0
        self._to_send: list[signal.Signals] = []
        self._capture: Capture | None = None
        self._progress_s = 0.0
        self._told = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    @property
    def command_exit_status(self) -> int | None:
        return None if self._child is None else self._child.returncode

    def follow(self, capture: Capture, writer: RecordingWriter) -> KsmtraceError | None:
        """Write the stream to the file; returns the error that cut it short, if one did."""
        from ksmtrace.stream import Trailer
        from ksmtrace.stream import Witnessed as Reading

        self._capture = capture
        failure: KsmtraceError | None = None
        try:
            for item in capture:
                writer.write(item)
                if isinstance(item, Reading) and item.moment == "asked":
                    self._show_reading(item)
                elif isinstance(item, Trailer):
                    self.ended_ns = item.ts_ns
            writer.close()
            failure = capture.progress.failure
        except KsmtraceError as error:
            writer.abandon()
            failure = error
        self.ended_ns = self.ended_ns or time.monotonic_ns()
        self._end_progress()
        if self._child is not None and self._child.poll() is None:
            # The recording failed, the command did not: it is not ours to end.
            click.echo("ksmtrace: recording has ended early; the command goes on", err=True)
            self._await_child()
        return failure

    def until(self) -> str | None:
        """Say whether the recording is to end now, and why; starts the command when first asked."""
        now_s = time.monotonic()
        if self._started_s is None:
            self._started_s = now_s
            if self._command:
                try:
                    self._child = subprocess.Popen(self._command, stdout=self._stdout)
                except OSError as error:
                    raise UsageError(
                        f"the command {self._command[0]!r} cannot be run: {error.strerror}",
                        "a script needs a first line such as #!/bin/sh",
                    ) from error
        self._show_progress(now_s)
        if self._child is not None and self._child.poll() is not None:
            self.reason = self.reason or "command ended"
            assert self._capture is not None
            self._capture.command_exit_status = self._child.returncode
            return self.reason
        if self._signals:
            self._take_signal(signal.Signals(self._signals.pop(0)), now_s)
        elif self._duration is not None and now_s - self._started_s >= self._duration:
            self._end_because("duration", now_s, signal.SIGTERM)
        if self.reason is not None and self._child is not None and now_s >= self._harder_s:
            self._end_child_harder(now_s)
        if self.reason is not None and (self._child is None or self._child.poll() is not None):
            return self.reason
        return None

    def _take_signal(self, number: signal.Signals, now_s: float) -> None:
        if self.reason is not None:
            self._harder_s = now_s  # whoever asks again does not want to wait
        elif number == signal.SIGINT:
            # A terminal's Ctrl-C has reached the command as well: it gets the time to end.
            self._end_because(_STOPPING[number], now_s + _COMMAND_GRACE_S, signal.SIGTERM)
        else:
            self._end_because(_STOPPING[number], now_s, number)

    def _end_because(self, reason: str, from_s: float, first: signal.Signals) -> None:
        if self.reason is None:
            self.reason = reason
            self._harder_s = from_s
            self._to_send = [first, signal.SIGKILL]

    def _end_child_harder(self, now_s: float) -> None:
        assert self._child is not None
        if self._to_send:
            self._child.send_signal(self._to_send.pop(0))
            self._harder_s = now_s + _COMMAND_GRACE_S

    def _await_child(self) -> None:
        assert self._child is not None
        while self._child.poll() is None:
            if self._signals:
                self._child.send_signal(self._signals.pop(0))
            time.sleep(0.05)

    def _show_progress(self, now_s: float) -> None:
        if self._quiet or not sys.stderr.isatty() or now_s < self._progress_s + _PROGRESS_S:
            return
        assert self._capture is not None and self._started_s is not None
        progress = self._capture.progress
        elapsed_s = now_s - self._started_s
        rate = progress.events / elapsed_s if elapsed_s else 0
        click.echo(
            f"\r\x1b[Krecording {elapsed_s:.0f} s: {text_count(progress.events)} events "
            f"({text_count(rate)}/s), {progress.dropped} lost, ring at most "
            f"{progress.fullest:.0%} full (Ctrl-C ends)",
            err=True,
            nl=False,
        )
        self._progress_s = now_s
        self._told = True

    def _show_reading(self, reading: Witnessed) -> None:
        if not self._quiet:
            self._end_progress()
            took = text_duration(reading.end_ns - reading.begin_ns)
            missing = "".join(f"; {part} not: {why}" for part, why in reading.why_not.items())
            click.echo(f"ksmtrace: what the kernel holds was read, in {took}{missing}", err=True)

    def _end_progress(self) -> None:
        if self._told:
            click.echo("\r\x1b[K", err=True, nl=False)


def _summary_line(summary: dict[str, Any], run: _Run) -> str:
    status = summary["command_exit_status"]
    ended = ""
    if status is not None and status < 0:
        ended = f"; the command was ended by {text_signal(-status)}"
    elif status:
        ended = f"; the command's exit status was {status}"
    lost = f"{summary['lost']} lost" if summary["lost"] else "none lost"
    return (
        f"{summary['file']}: {text_count(summary['events'])} events, {lost}, in "
        f"{text_duration(summary['duration_ns'])}, {text_bytes(summary['file_bytes'])} "
        f"({run.reason or 'failed'}){ended}"
    )
