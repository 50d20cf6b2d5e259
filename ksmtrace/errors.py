"""Every error that ksmtrace raises on purpose, with the exit status it ends a command with.

KsmtraceError
├── UsageError              2  the command line cannot be meant
├── CannotRun               3  something this machine lacks or forbids
│   ├── KernelFeatureMissing
│   ├── PrivilegeMissing
│   ├── BackendUnavailable     bcc or a tool that is not installed, or that failed
│   └── KernelInterfaceError   a kernel file that is there but unreadable or malformed
├── LostVM                255  a guest kernel that panicked, hung or went away: says nothing of CMD
├── WorkloadFailed          1  KSM did not do what the workload waited for
└── RecordingError          5  a file that is no readable recording
    ├── ForeignRecording
    ├── UnsupportedFormat
    └── DamagedRecording
"""

from __future__ import annotations


class KsmtraceError(Exception):
    """One line saying what is wrong, and a hint that says what to do about it.

    Attributes:
        hint: what the user can do, or None where there is nothing to do.
        exit_status: the status a command ends with (see docs/architecture.md).
    """

    exit_status = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(KsmtraceError):
    """The command line or an option's value cannot be meant."""

    exit_status = 2


class CannotRun(KsmtraceError):
    """Something that this machine lacks or forbids."""

    exit_status = 3


class KernelFeatureMissing(CannotRun):
    """This kernel has no such interface."""


class PrivilegeMissing(CannotRun):
    """This user may not do that here."""


class BackendUnavailable(CannotRun):
    """A program or library that ksmtrace drives is missing or failed."""


class KernelInterfaceError(CannotRun):
    """A kernel interface is there, but unreadable or not in the documented form."""


class LostVM(KsmtraceError):
    """A guest kernel panicked, oopsed, hung or went away: no statement about the command in it.

    Attributes:
        console_tail: the last lines that the guest's kernel wrote.
        has_booted: whether the guest had reported that it was up.
    """

    exit_status = 255

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        console_tail: tuple[str, ...] = (),
        has_booted: bool = True,
    ) -> None:
        super().__init__(message, hint)
        self.console_tail = console_tail
        self.has_booted = has_booted


class WorkloadFailed(KsmtraceError):
    """KSM did not do within its bound what a workload waited for."""


class RecordingError(KsmtraceError):
    """A file that cannot be read as a recording."""

    exit_status = 5


class ForeignRecording(RecordingError):
    """The file was not written by ksmtrace."""


class UnsupportedFormat(RecordingError):
    """The recording's format version is not one this ksmtrace reads."""


class DamagedRecording(RecordingError):
    """Bytes inside the recording do not decode."""
