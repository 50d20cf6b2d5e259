"""Carries out the trials on this kernel while it is recorded; what claims are judged on."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ksmtrace.analysis.recorded import gather
from ksmtrace.claims.claim import Case, Claim
from ksmtrace.errors import (
    BackendUnavailable,
    CannotRun,
    RecordingError,
    UsageError,
    WorkloadFailed,
)
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.recording.witness import ROWS_NOTE, Gathering
from ksmtrace.stream import Witnessed
from ksmtrace.workload.trial import Trial
from ksmtrace.workload.trials import TRIALS

Report = Callable[[str], None]

# Compiling the programs takes minutes under emulation, on a machine that has other work, and to
# detach them some as well.
_ATTACH_S = 600.0
_END_S = 600.0
_SAMPLE_INTERVAL = "0.5"
_RECORDING, _TRIALS = "selftest.ksmt", "trials.jsonl"
_KSMTRACE = [sys.executable, "-c", "from ksmtrace.cli import main; main()"]
_PERFORM = [sys.executable, "-m", "ksmtrace.claims.perform"]


def trials_for(claims: Sequence[Claim]) -> list[str]:
    """Name the trials that these claims take, in their order; all where a claim takes none."""
    if any(not claim.trials and claim.check is not None for claim in claims):
        return list(TRIALS)
    wanted = {name for claim in claims for name in claim.trials}
    return [name for name in TRIALS if name in wanted]


def perform(
    names: Sequence[str],
    timeout_seconds: float,
    folder: Path,
    report: Report,
    every_page: bool = True,
) -> bool:
    """Carry out trials on this kernel while it is recorded, as far as it can be.

    Args:
        names: of :data:`ksmtrace.workload.trials.TRIALS`.
        timeout_seconds: bound of each wait of a trial.
        folder: where the recording goes, as ``selftest.ksmt``, and what the trials say, as
            ``trials.jsonl``; for :func:`read_performed`.
        report: takes a line of progress.
        every_page: whether to record an event of every page that ksmd looks at.

    Returns:
        Whether there is a recording; else this kernel cannot be recorded.

    Raises:
        CannotRun: no privilege, no KSM, or others use KSM.
        WorkloadFailed: the process that carries out the trials failed.
    """
    recording, said = folder / _RECORDING, folder / _TRIALS
    recording.unlink(missing_ok=True)
    options = ["--interval", _SAMPLE_INTERVAL, "--quiet", "-o", str(recording)]
    options += ["--every-page"] if every_page else []
    program = [*_PERFORM, str(timeout_seconds), *names]
    report(f"waiting for the recorder to attach its programs, at most {_ATTACH_S:g} s")
    if _listen([*_KSMTRACE, "record", *options, "--", *program], said):
        return True
    report("this kernel cannot be recorded (see above): only its state is judged")
    if not _listen(program, said):
        raise WorkloadFailed("the trials did not begin")
    return False


def read_performed(folder: Path, state: Callable[[], Case] | None = None) -> Case:
    """Read what :func:`perform` left in a folder: what claims are judged on.

    Args:
        folder: the folder.
        state: reads the kernel that the trials were carried out on as it stands, where there is
            no recording of it; None where that kernel is another than the running one.

    Raises:
        RecordingError: a file is not readable as what it should be.
    """
    recording, said = folder / _RECORDING, folder / _TRIALS
    trials: dict[str, Trial] = {}
    readings: list[Witnessed] = []
    gathering: Gathering | None = None
    try:
        for line in said.read_text().splitlines():
            content = json.loads(line)
            if "trial" in content:
                trial = Trial.from_json(content["trial"])
                trials[trial.name] = trial
            elif content["note"]["type"] != ROWS_NOTE:
                gathering = Gathering(content["note"])
            elif gathering is not None:
                gathering.add(content["note"])
            if gathering is not None and (whole := gathering.whole()) is not None:
                readings.append(whole)
                gathering = None
    except FileNotFoundError:
        raise RecordingError(
            f"{folder} holds no {_TRIALS}", "give a recording, or a folder of selftest --save"
        ) from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise RecordingError(f"{said} does not hold trials: {error}") from error
    if recording.exists() or state is None:
        recorded = gather(RecordingReader(recording))
    else:
        recorded = state().recorded
    recorded.witnessed += readings
    recorded.witnessed.sort(key=lambda reading: reading.begin_ns)
    return Case(recorded, trials)


def _listen(command: Sequence[str], said: Path) -> bool:
    """Run the program of the trials, alone or under a recorder, and keep what it says.

    Returns:
        False where the recorder cannot run here, and has started nothing.
    """
    # One thread: numpy would start others for linear algebra, and trials fork.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    failure: dict[str, Any] | None = None
    begun = False
    with (
        said.open("w") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            if not select.select([process.stdout], [], [], _ATTACH_S)[0]:
                raise BackendUnavailable(f"the recorder did not begin within {_ATTACH_S:g} s")
            for line in process.stdout:
                begun = True
                if line.startswith('{"error"'):
                    failure = json.loads(line)
                else:
                    kept.write(line)
            status = process.wait(_END_S)
        except BaseException:
            # Whoever has the knobs puts them back.
            process.terminate()
            raise
    if failure is not None and failure["exit_status"] == CannotRun.exit_status:
        raise CannotRun(failure["error"], failure["hint"])
    if failure is not None:
        raise WorkloadFailed(f"the trials were not carried out: {failure['error']}")
    if status == CannotRun.exit_status and not begun:
        return False
    if status:
        raise WorkloadFailed(f"the trials were not carried out: exit status {status}")
    return True


@contextlib.contextmanager
def folder_for(kept: Path | None) -> Iterator[Path]:
    """Give a folder for the recording: the one to keep, or one that vanishes."""
    if kept is not None:
        try:
            kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{kept} cannot be made: {error.strerror}") from error
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="ksmtrace-selftest-") as name:
        yield Path(name)
