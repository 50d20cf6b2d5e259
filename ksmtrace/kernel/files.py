"""Reads the kernel's text files: absent is None, refused and broken are errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ksmtrace.errors import KernelInterfaceError, PrivilegeMissing

ROOT = Path("/")
"""The running kernel's tree; a reader given another root reads a copy of one."""

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESRCH, errno.ENXIO})
_REFUSED = frozenset({errno.EACCES, errno.EPERM})
_CHUNK = 1 << 20


def read_file(path: str) -> bytes | None:
    """Read a whole kernel file.

    Args:
        path: a str, as this runs for dozens of files every second.

    Returns:
        The bytes; None where the file, or the process that it belongs to, does not exist
        (ENOENT, and ESRCH from a file of a process that ended after the open).

    Raises:
        PrivilegeMissing: this user may not read it.
        KernelInterfaceError: reading failed in any other way.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # One read suffices for the small files; a seq_file may hand out less than asked for.
            chunks = []
            while chunk := os.read(fd, _CHUNK):
                chunks.append(chunk)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise _refusal(path, error) from error
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def read_text(path: str) -> str | None:
    """Read a kernel file as stripped text; None where it does not exist."""
    content = read_file(path)
    return None if content is None else content.decode(errors="replace").strip()


def read_int(path: str) -> int | None:
    """Read a kernel file that holds one decimal number; None where it does not exist.

    Raises:
        KernelInterfaceError: it holds something else.
    """
    content = read_file(path)
    return None if content is None else parse_int(content, path)


def parse_int(content: bytes, path: str) -> int:
    """Parse one decimal number.

    Raises:
        KernelInterfaceError: it is none.
    """
    try:
        return int(content)
    except ValueError:
        raise KernelInterfaceError(f"{path} holds {content[:40]!r}, not a number") from None


def parse_selected(content: str, path: str) -> str:
    """Parse the bracketed word of a choice such as ``[none] scan-time``.

    Raises:
        KernelInterfaceError: no word is bracketed.
    """
    selected = [word[1:-1] for word in content.split() if word[0] == "[" and word[-1] == "]"]
    if len(selected) != 1:
        raise KernelInterfaceError(f"{path} holds {content[:60]!r}, not a choice with one [word]")
    return selected[0]


def _refusal(path: str, error: OSError) -> KernelInterfaceError | PrivilegeMissing:
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    if error.errno in _REFUSED:
        return PrivilegeMissing(f"{path} cannot be read: {name}", "run as root")
    return KernelInterfaceError(f"{path} cannot be read: {name}")
