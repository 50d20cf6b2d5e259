"""The process that carries out trials: one thread, one JSON object per line on stdout.

A process of its own, because trials fork, and whoever judges has the threads of numpy and Arrow.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time

from ksmtrace.errors import CannotRun, KsmtraceError
from ksmtrace.kernel.ksm_memory import KsmMemoryReader
from ksmtrace.kernel.page_truth import read_page_truth
from ksmtrace.kernel.pages import probe_kpf_ksm
from ksmtrace.kernel.procfs import find_ksmd
from ksmtrace.recording.witness import iter_notes
from ksmtrace.stream import Witnessed
from ksmtrace.workload.knobs import saved_knobs
from ksmtrace.workload.lab import Lab
from ksmtrace.workload.registered import registered_processes
from ksmtrace.workload.signals import stop_on_signals
from ksmtrace.workload.trials import TRIALS

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Carry out the trials named on the command line, after the bound of each wait in seconds."""
    # A recorder that is killed takes the trials with it, which put the knobs back.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        _perform(float(sys.argv[1]), sys.argv[2:])
    except KsmtraceError as error:
        _say({"error": str(error), "hint": error.hint, "exit_status": error.exit_status})
        sys.exit(error.exit_status)


def _perform(timeout_seconds: float, names: list[str]) -> None:
    others = registered_processes()
    if others:
        named = ", ".join(f"{comm} (pid {pid})" for pid, comm in list(others.items())[:3])
        raise CannotRun(
            f"KSM is in use by {named}: what they do cannot be told from what the trials do",
            "end them, or test a guest: --kernel",
        )
    witness = _Witness()
    with stop_on_signals() as stop, saved_knobs(_report) as knobs:
        lab = Lab(knobs, stop, _report, timeout_seconds, find_ksmd(), witness.read)
        for name in names:
            _say({"trial": lab.carry_out(name, TRIALS[name], {}).to_json()})
            stop.check()


class _Witness:
    # Symbols and offsets are looked up once, which takes longer than all readings.

    def __init__(self) -> None:
        self._why_not: dict[str, str] = {}
        self._reader: KsmMemoryReader | None = None
        try:
            self._reader = KsmMemoryReader.open()
        except CannotRun as error:
            self._why_not["memory"] = str(error)
        self._kpf_ksm = probe_kpf_ksm()

    def read(self) -> None:
        begin_ns = time.monotonic_ns()
        why_not = dict(self._why_not)
        memory, pages = None, None
        try:
            memory = self._reader.read() if self._reader is not None else None
        except CannotRun as error:
            why_not["memory"] = str(error)
        try:
            pages = read_page_truth(kpf_ksm=self._kpf_ksm)
        except CannotRun as error:
            why_not["pages"] = str(error)
        reading = Witnessed("asked", begin_ns, time.monotonic_ns(), memory, pages, why_not)
        for note in iter_notes(reading):
            _say({"note": note})


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say(content: dict[str, object]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
