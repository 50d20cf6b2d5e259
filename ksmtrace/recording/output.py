"""Creates the files that hold what was recorded: readable by their owner only."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ksmtrace.errors import CannotRun, UsageError


def create(path: Path, force: bool) -> int:
    """Create a file with mode 0600 for writing, and return its descriptor.

    Args:
        path: where.
        force: overwrite an existing regular file.

    Raises:
        UsageError: the file exists and ``force`` is off, or its directory does not exist.
        CannotRun: it cannot be created.
    """
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
            raise UsageError(
                f"{path}: {error.strerror}", "choose a file in a directory that exists"
            ) from error
        raise CannotRun(f"{path} cannot be created: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_a_file(path)
    os.fchmod(fd, 0o600)  # with force the file may have had another mode
    return fd


def write_new(path: Path, content: bytes, force: bool) -> None:
    """Create a file as :func:`create` does, and write all of it.

    Raises:
        UsageError, CannotRun: as :func:`create`; or the disk is full.
    """
    fd = create(path, force)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
    except OSError as error:
        raise CannotRun(f"{path} cannot be written: {error.strerror}") from error


def _not_a_file(path: Path) -> UsageError:
    return UsageError(f"{path} is no regular file", "choose another name")
