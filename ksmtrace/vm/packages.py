"""Kernels out of Debian packages, without touching what this machine has installed.

apt does the work, with lists and sources of its own: it verifies the archive's signatures and
takes an interrupted download up again. A kernel is unpacked beside the cache and renamed into it,
so what is in the cache is whole.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmtrace.errors import BackendUnavailable, CannotRun, UsageError
from ksmtrace.units import text_bytes
from ksmtrace.vm.cache import Notify, cache_directory, locked

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# How long a choice, and the package lists it was made from, count as current.
FRESH_S = 24 * 3600.0

# Which Debian release has which series. All others come and go in the two suites of NEWEST.
_SUITES_OF_SERIES = {
    "5.10": ("bullseye", "bullseye-security"),
    "6.1": ("bookworm", "bookworm-security"),
    "6.12": ("trixie", "trixie-security"),
}
NEWEST = ("trixie-backports", "sid")

_RELEASE_NAMES = (
    "buster|bullseye|bookworm|trixie|forky|duke|sid|(?:old){0,2}stable|testing|unstable"
)
# Before 6.19 all of a kernel was in linux-image-*; since then its parts are packages.
_IMAGE = re.compile(
    r"linux-(?P<part>image|binary)-(?:unsigned-)?"
    r"(?P<abi>(?P<version>[0-9]+\.[0-9]+)[0-9a-z.+~-]*)-amd64(?:-unsigned)?"
)
_FLAVOURS = re.compile(r"-(?:cloud|rt)\b")
_NO_SPACE = "No space left on device"


@dataclass(frozen=True)
class Source:
    """An archive this machine takes Debian packages from."""

    uri: str
    release: str


@dataclass(frozen=True)
class KernelPackages:
    """The packages that make up one kernel.

    Attributes:
        release: what ``uname -r`` says; of a source package its series.
        version: the Debian version of all of them.
        names: what to download.
    """

    release: str
    version: str
    names: tuple[str, ...]


def fetch(series: str, notify: Notify) -> Path:
    """Return the directory of an unpacked kernel, fetched if need be.

    Args:
        series: ``6.12``, or ``7.x`` for the newest 7, means the newest of them; a release, as
            ``6.1.0-57-amd64``, that one.
        notify: is told what takes time.
    """
    cache = cache_directory()
    known = _known_choice(cache, series, FRESH_S)
    if known is not None:
        return known
    if platform.machine() != "x86_64":
        raise CannotRun(f"guests are x86_64, and this machine is {platform.machine()}")
    with locked(cache, notify):
        known = _known_choice(cache, series, FRESH_S)
        if known is not None:
            return known
        _remove_leftovers(cache)
        try:
            root = _fetch_newest(cache, series, notify)
        except UsageError:
            raise
        except CannotRun as error:
            known = _known_choice(cache, series, float("inf"))
            if known is None:
                raise
            notify(f"{error}; taking {known.name}, fetched earlier")
            return known
        _write(_choice_file(cache, series), json.dumps({"release": root.name}))
        return root


def _choice_file(cache: Path, series: str) -> Path:
    return cache / "series" / f"{series}.json"


def _known_choice(cache: Path, series: str, fresh_s: float) -> Path | None:
    # What a release means never changes.
    if series.endswith("-amd64"):
        root = cache / "debian" / series
        return root if root.is_dir() else None
    path = _choice_file(cache, series)
    try:
        age_s = time.time() - path.stat().st_mtime
        root = cache / "debian" / json.loads(path.read_text())["release"]
    except (OSError, ValueError):
        return None
    return root if 0 <= age_s < fresh_s and root.is_dir() else None


def prepared_apt(cache: Path, series: str, notify: Notify) -> Apt:
    """Return an apt that knows a series, with package lists that are current.

    Args:
        cache: the directory of the kernels, locked.
        series: ``6.12``, ``7.x``, or a release.
        notify: is told what takes time.
    """
    suites = _SUITES_OF_SERIES.get(".".join(re.findall(r"[0-9]+", series)[:2]), NEWEST)
    apt = Apt(cache / "apt" / suites[0])
    apt.configure(sources_for(suites, apt.machine_sources()))
    if apt.lists_age_s() > FRESH_S:
        notify(f"reading which kernels Debian has ({', '.join(suites)})")
        apt.update()
    return apt


def _fetch_newest(cache: Path, series: str, notify: Notify) -> Path:
    apt = prepared_apt(cache, series, notify)
    names = apt.names()
    packages = apt.versions([name for name in names if _in_series(name, series)])
    kernel = choose(series, packages, names)
    if kernel is None:
        there = ", ".join([*_SUITES_OF_SERIES, *all_series(names)])
        raise UsageError(f"Debian has no kernel {series} now", f"there are: {there}, and 7.x")
    root = cache / "debian" / kernel.release
    if not root.is_dir():
        download_bytes, unpacked_bytes = apt.sizes(kernel)
        check_space(cache, download_bytes + unpacked_bytes)
        notify(f"fetching kernel {kernel.release} ({text_bytes(download_bytes)})")
        _unpack(apt.download(kernel), root, kernel.release)
        apt.forget_downloads()
    return root


def _in_series(name: str, series: str) -> bool:
    found = _IMAGE.fullmatch(name)
    if found is None or _FLAVOURS.search(name):
        return False
    return f"{found['abi']}-amd64" == series or is_of_series(found["version"], series)


def is_of_series(version: str, series: str) -> bool:
    """Say whether a kernel's version, as ``7.3``, is of a series, as ``7.3`` or ``7.x``."""
    return version == series or (series.endswith(".x") and version.startswith(series[:-1]))


def choose(
    series: str, versions: Iterable[tuple[str, str]], names: Iterable[str]
) -> KernelPackages | None:
    """Return the newest kernel of a series, or the one of a release.

    Args:
        series: ``6.12``, ``7.x``, or a release.
        versions: names of packages with their versions, a name as often as it has versions.
        names: all names of packages, to know what a kernel is split into.
    """
    names = set(names)
    candidates: list[tuple[str, str, str]] = []
    for name, version in versions:
        found = _IMAGE.fullmatch(name)
        if found is None or not _in_series(name, series):
            continue
        release = f"{found['abi']}-amd64"
        # The image package of a split kernel holds nothing; its parts may be there before it.
        if (found["part"] == "binary") == (f"linux-modules-{release}" in names):
            candidates.append((version, release, name))
    if not candidates:
        return None
    newest = max({version for version, _, _ in candidates}, key=version_key)
    # Of a signed and an unsigned image either will do: the shorter name is the signed one.
    _, release, name = min(
        (candidate for candidate in candidates if candidate[0] == newest),
        key=lambda candidate: len(candidate[2]),
    )
    parts = [f"linux-modules-{release}", f"linux-base-{release}"]
    return KernelPackages(release, newest, (name, *(part for part in parts if part in names)))


def all_series(names: Iterable[str]) -> list[str]:
    """Return the series that there are kernels of, oldest first."""
    found = {match["version"] for match in map(_IMAGE.fullmatch, names) if match}
    return sorted(found, key=lambda series: [int(number) for number in series.split(".")])


@functools.cmp_to_key
def version_key(one: str, other: str) -> int:
    """Order Debian versions, as dpkg does."""
    for relation, order in (("lt", -1), ("gt", 1)):
        if not subprocess.run(["dpkg", "--compare-versions", one, relation, other]).returncode:
            return order
    return 0


def sources_for(suites: Sequence[str], machine: Sequence[Source]) -> str:
    """Return the sources of other suites in the archives that this machine uses (deb822)."""
    plain = next((s.uri for s in machine if re.fullmatch(_RELEASE_NAMES, s.release)), None)
    security = next(
        (s.uri for s in machine if re.fullmatch(f"(?:{_RELEASE_NAMES})-security", s.release)), None
    )
    if plain is None:
        raise CannotRun(
            "this machine has no Debian package source, so kernels cannot be fetched",
            "give the path of a bzImage instead of a series",
        )
    stanzas = []
    for suite in suites:
        uri = security if suite.endswith("-security") else plain
        if uri is not None:
            signed = f"Signed-By: {KEYRING}\n" if KEYRING.exists() else ""
            stanzas.append(f"Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\n{signed}")
    return "\n".join(stanzas)


class Apt:
    """apt with its own sources, lists and downloads below one directory.

    What this machine sets for the network (proxies, retries, certificates) stays in force; hooks
    and preferences do not.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise BackendUnavailable(
                "apt is not installed, so kernels cannot be fetched",
                "give the path of a bzImage instead of a series",
            )

    def machine_sources(self) -> list[Source]:
        """Return the package sources of this machine; they need not have been updated ever."""
        return parse_print_uris(self._run_plain("apt-get", "update", "--print-uris"))

    def configure(self, sources: str) -> None:
        """Write the private configuration; lists of other sources are not current any more."""
        for name in ("lists/partial", "cache/archives/partial", "sources"):
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        settings = [
            line
            for line in self._run_plain("apt-config", "dump").splitlines()
            if re.match(r"Acquire::(?!IndexTargets|Languages|GzipIndexes)\S+ ", line)
        ]
        own = {
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": self._directory / "sources",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": self._directory / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": self._directory / "cache",
            # Each is as large as the lists, and these are read once a day.
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Acquire::GzipIndexes": "true",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "APT::Architecture": "amd64",
            # apt's own user cannot write below a home directory.
            "APT::Sandbox::User": "root",
        }
        settings += [f'{name} "{value}";' for name, value in own.items()]
        _write(self._directory / "apt.conf", "\n".join(settings) + "\n")
        listed = self._directory / "sources" / "debian.sources"
        if not listed.exists() or listed.read_text() != sources:
            self._stamp.unlink(missing_ok=True)
            _write(listed, sources)

    @property
    def _stamp(self) -> Path:
        return self._directory / "updated"

    def lists_age_s(self) -> float:
        """Return how old the package lists are."""
        try:
            return abs(time.time() - self._stamp.stat().st_mtime)
        except FileNotFoundError:
            return float("inf")

    def update(self) -> None:
        """Fetch and verify the package lists."""
        self._run("apt-get", "-qq", "update", "--error-on=any")
        self._stamp.touch()

    def names(self) -> list[str]:
        """Return the names of all kernel packages."""
        return self._run("apt-cache", "pkgnames", "linux-").split()

    def versions(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Return the names with each of their versions."""
        return parse_madison(self._run("apt-cache", "madison", *names)) if names else []

    def sizes(self, kernel: KernelPackages) -> tuple[int, int]:
        """Return the bytes to download, and the bytes they unpack to."""
        shown = self._run("apt-cache", "show", *self._pinned(kernel))
        return (
            sum(int(size) for size in re.findall(r"^Size: ([0-9]+)$", shown, re.MULTILINE)),
            sum(
                int(size) << 10
                for size in re.findall(r"^Installed-Size: ([0-9]+)$", shown, re.MULTILINE)
            ),
        )

    def download(self, kernel: KernelPackages) -> list[Path]:
        """Fetch and verify the packages."""
        archives = self._directory / "cache" / "archives"
        self._run("apt-get", "-qq", "download", *self._pinned(kernel), directory=archives)
        found = []
        for name in kernel.names:
            found += [path for path in archives.glob(f"{name}_*.deb")]
        if len(found) != len(kernel.names):
            raise CannotRun(f"apt downloaded {len(found)} of {len(kernel.names)} packages")
        return found

    def forget_downloads(self) -> None:
        """Delete the packages: they are unpacked."""
        for path in (self._directory / "cache" / "archives").glob("*.deb"):
            path.unlink()

    def _pinned(self, kernel: KernelPackages) -> list[str]:
        return [f"{name}={kernel.version}" for name in kernel.names]

    def _run(self, *command: str, directory: Path | None = None) -> str:
        return _output_of(command, self._directory / "apt.conf", directory)

    def _run_plain(self, *command: str) -> str:
        return _output_of(command, None, None)


def parse_print_uris(output: str) -> list[Source]:
    """Parse ``apt-get update --print-uris``: where the releases' files are."""
    found = re.findall(r"^'(\S+/)dists/(\S+)/InRelease' ", output, re.MULTILINE)
    return [Source(uri, release) for uri, release in found]


def parse_madison(output: str) -> list[tuple[str, str]]:
    """Parse ``apt-cache madison``: names with their versions."""
    fields = [[field.strip() for field in line.split("|")] for line in output.splitlines()]
    return [(words[0], words[1]) for words in fields if len(words) == 3]


def _output_of(command: Sequence[str], configuration: Path | None, directory: Path | None) -> str:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    environment.pop("APT_CONFIG", None)
    if configuration is not None:
        environment["APT_CONFIG"] = str(configuration)
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        cwd=directory,
        env=environment,
    )
    if done.returncode:
        words = [word for word in command if not word.startswith("-")]
        raise apt_failure(words[:2], done.stderr)
    return done.stdout


def apt_failure(command: Sequence[str], stderr: str) -> CannotRun:
    """Return what a failure of apt means: no space, no network, or something else."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    if any(_NO_SPACE in line for line in lines):
        return _no_space()
    errors = [line for line in lines if line.startswith(("E:", "W:", "Err:"))] or lines
    first = errors[0].removeprefix("E: ").removeprefix("W: ") if errors else "no message"
    unreachable = (
        "resolving",
        "Could not resolve",
        "Could not connect",
        "Unable to connect",
        "timed out",
    )
    if any(word in line for word in unreachable for line in lines):
        return CannotRun(
            f"the Debian archive cannot be reached: {first}",
            "is there a network? a kernel that was fetched once needs none, and neither "
            "does the path of a bzImage",
        )
    return CannotRun(
        f"{' '.join(command)} failed: {first}", "do this machine's own package sources work?"
    )


def check_space(cache: Path, needed_bytes: int) -> None:
    """Raise CannotRun where there is less room than that."""
    free_bytes = shutil.disk_usage(cache).free
    if free_bytes < needed_bytes:
        raise CannotRun(
            f"no space in {cache}: a kernel needs {text_bytes(needed_bytes)}, and "
            f"{text_bytes(free_bytes)} are free",
            "make room, or point XDG_CACHE_HOME elsewhere",
        )


def _no_space() -> CannotRun:
    return CannotRun(
        f"no space left in {cache_directory()}", "make room, or point XDG_CACHE_HOME elsewhere"
    )


def _unpack(archives: Sequence[Path], root: Path, release: str) -> None:
    root.parent.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=root.parent))
    try:
        scratch.chmod(0o755)
        for archive in archives:
            _tool("dpkg-deb", "-x", str(archive), str(scratch))
        # Newer packages have modules in usr/lib only; depmod and virtme-ng look in lib.
        if not (scratch / "lib").exists():
            (scratch / "lib").symlink_to("usr/lib")
        _tool("depmod", "-b", str(scratch), release)
        scratch.rename(root)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _tool(*command: str) -> None:
    program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise BackendUnavailable(
            f"{command[0]} is not installed",
            "apt-get install kmod" if command[0] == "depmod" else None,
        )
    done = subprocess.run(
        [program, *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        if _NO_SPACE in done.stderr:
            raise _no_space()
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CannotRun(f"{command[0]} failed: {last}")


# Only under the lock: nobody is unpacking then.
def _remove_leftovers(cache: Path) -> None:
    for path in (cache / "debian").glob(".unpacking-*"):
        shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.rename(path)
