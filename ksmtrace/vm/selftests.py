"""The kernel's own tests of KSM, built from Debian's source package: workloads of other people.

They are built with the kernel's own Makefile and without shared libraries, so that they run in any
guest and on any machine. What is built stays in the cache until somebody deletes it there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ksmtrace.errors import BackendUnavailable, CannotRun, UsageError
from ksmtrace.vm import packages
from ksmtrace.vm.cache import Notify, cache_directory, locked

PROGRAMS = ("ksm_tests", "ksm_functional_tests")
"""The programs (tools/testing/selftests/mm)."""

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("ksm_tests", "-M", "-p", "10"),
    ("ksm_tests", "-U"),
    ("ksm_tests", "-Z", "-p", "10", "-z", "0"),
    ("ksm_tests", "-Z", "-p", "10", "-z", "1"),
    ("ksm_functional_tests",),
)
"""How the kernel runs them: tools/testing/selftests/mm/run_vmtests.sh, CATEGORY="ksm", without the
two that take times only."""

NUMA_COMMANDS: tuple[tuple[str, ...], ...] = (
    ("ksm_tests", "-N", "-m", "1"),
    ("ksm_tests", "-N", "-m", "0"),
)
"""The same of CATEGORY="ksm_numa", for two NUMA nodes and more."""

_SOURCE = re.compile(r"linux-source-(?P<version>[0-9]+\.[0-9]+)")
# What the Makefile of the tests, and that of the headers that they include, reads. The rule for a
# test needs every file that it names to be there, of mm/ as well.
_PARTS = ("Makefile", "Kbuild", "arch/x86", "include", "mm", "scripts", "tools", "usr")
# Measured with 6.12: the package, the archive in it, and what is taken from that.
_UNPACKED_PER_BYTE = 2.2
_SAID_AT_MOST = 300


def fetch_selftests(series: str = "6.12", notify: Notify = lambda text: None) -> Path:
    """Return the directory that has :data:`PROGRAMS`, built if need be.

    Args:
        series: the Debian series whose source they are of; ``7.x`` for the newest 7. Any will run
            on any kernel: what a kernel does not have they skip.
        notify: is told what takes time.

    Raises:
        UsageError: Debian has no source of that series, or it has no such tests.
        CannotRun: fetching or building failed; a compiler or a library is missing.
    """
    cache = cache_directory("selftests")
    directory = cache / series
    with locked(cache, notify):
        if not directory.is_dir():
            _build(cache, series, directory, notify)
    return directory


def _build(cache: Path, series: str, directory: Path, notify: Notify) -> None:
    for old in cache.glob(".building-*"):
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as name:
        scratch = Path(name)
        source = _unpack(_download(series, scratch, notify), scratch)
        if not (source / "tools/testing/selftests/mm/ksm_functional_tests.c").exists():
            raise UsageError(f"the source of {series} has no such tests", "6.4 and later have")
        notify("building the kernel's own KSM tests")
        built = scratch / "built"
        built.mkdir()
        _make(source, "headers")
        tests = [str(built / program) for program in PROGRAMS]
        _make(
            source / "tools/testing/selftests/mm", f"OUTPUT={built}", "EXTRA_CFLAGS=-static", *tests
        )
        built.rename(directory)


# The source package of a series, in the scratch directory.
def _download(series: str, scratch: Path, notify: Notify) -> Path:
    # The package lists are the kernels'.
    kernels = cache_directory()
    with locked(kernels, notify):
        apt = packages.prepared_apt(kernels, series, notify)
        names = [name for name in apt.names() if _SOURCE.fullmatch(name)]
        chosen = choose_source(series, apt.versions(names))
        if chosen is None:
            raise UsageError(f"Debian has no kernel source {series} now")
        notify(f"fetching {chosen.names[0]} {chosen.version}")
        (archive,) = apt.download(chosen)
        packages.check_space(scratch, int(_UNPACKED_PER_BYTE * archive.stat().st_size))
        return Path(shutil.move(archive, scratch))


def choose_source(
    series: str, versions: Sequence[tuple[str, str]]
) -> packages.KernelPackages | None:
    """Return the newest source package of a series, None where there is none.

    Args:
        series: ``6.12`` or ``7.x``.
        versions: names of source packages with their versions, a name as often as it has versions.
    """
    candidates = [
        (version, name)
        for name, version in versions
        if (found := _SOURCE.fullmatch(name)) and packages.is_of_series(found["version"], series)
    ]
    if not candidates:
        return None
    version, name = max(candidates, key=lambda candidate: packages.version_key(candidate[0]))
    return packages.KernelPackages(series, version, (name,))


# Streams what is wanted out of the archive in the package; the whole would be 1.5 GB.
def _unpack(package: Path, scratch: Path) -> Path:
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        try:
            with tarfile.open(fileobj=reader.stdout, mode="r|") as outer:
                for member in outer:
                    if member.isfile() and member.name.endswith(".tar.xz"):
                        with tarfile.open(fileobj=outer.extractfile(member), mode="r|xz") as inner:
                            inner.extractall(scratch, _wanted(inner))
                        break
        except OSError as error:
            raise CannotRun(f"{package.name} cannot be unpacked: {error}") from error
        finally:
            reader.terminate()
    package.unlink()
    try:
        (makefile,) = scratch.glob("*/Makefile")
    except ValueError:
        raise CannotRun(f"{package.name} holds no kernel source") from None
    return makefile.parent


def _wanted(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    # Names begin with that of the one directory that all of it is in.
    for member in archive:
        path = member.name.partition("/")[2]
        if any(path == part or path.startswith(f"{part}/") for part in _PARTS):
            yield member


def _make(directory: Path, *arguments: str) -> None:
    program = shutil.which("make")
    if program is None or shutil.which("gcc") is None:
        raise BackendUnavailable(
            "there is no C compiler", "apt-get install gcc make libc6-dev libnuma-dev"
        )
    # A make that has called this one must not pass its own flags on.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        [program, "-s", "-C", str(directory), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**environment, "LC_ALL": "C.UTF-8"},
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        said = (lines or ["no message"])[0][:_SAID_AT_MOST]
        raise CannotRun(
            f"the kernel's own KSM tests cannot be built: {said}",
            "apt-get install gcc make libc6-dev libnuma-dev",
        )
