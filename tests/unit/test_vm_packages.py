"""Which packages a series means, judged by recorded output of apt-cache."""

import shutil
from pathlib import Path

import pytest

from ksmtrace.errors import CannotRun, UsageError
from ksmtrace.vm import cache, packages
from ksmtrace.vm.packages import KernelPackages, Source, all_series, choose, parse_madison

RECORDED = Path(__file__).parents[1] / "golden" / "apt"

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg") is None, reason="dpkg compares versions")


def chosen(suite: str, series: str) -> KernelPackages | None:
    names = (RECORDED / f"{suite}.names").read_text().split()
    return choose(series, parse_madison((RECORDED / f"{suite}.madison").read_text()), names)


@needs_dpkg
@pytest.mark.parametrize(
    ("suite", "series", "expected"),
    [
        (
            "bullseye",
            "5.10",
            KernelPackages("5.10.0-46-amd64", "5.10.262-1", ("linux-image-5.10.0-46-amd64",)),
        ),
        # bullseye-security has a 6.1 as well: older, by its Debian version.
        (
            "bookworm",
            "6.1",
            KernelPackages("6.1.0-56-amd64", "6.1.192-2", ("linux-image-6.1.0-56-amd64",)),
        ),
        (
            "trixie",
            "6.12",
            KernelPackages(
                "6.12.117+deb13-amd64", "6.12.117-1", ("linux-image-6.12.117+deb13-amd64",)
            ),
        ),
    ],
)
def test_the_newest_of_a_series(suite: str, series: str, expected: KernelPackages) -> None:
    assert chosen(suite, series) == expected


@needs_dpkg
@pytest.mark.parametrize(
    ("suite", "release", "version"),
    [
        ("bookworm", "6.1.0-50-amd64", "6.1.176-1"),
        ("trixie-backports", "7.2.12+deb13-amd64", "7.2.12-1~bpo13+1"),
    ],
)
def test_a_release_is_that_one_though_there_are_newer(
    suite: str, release: str, version: str
) -> None:
    found = chosen(suite, release)
    assert found is not None
    assert (found.release, found.version) == (release, version)
    assert chosen(suite, release.replace("-amd64", "9-amd64")) is None


def test_a_release_that_was_fetched_takes_no_archive(kernels: Path) -> None:
    there = kernels / "debian" / "6.1.0-50-amd64"
    there.mkdir(parents=True)
    assert packages.fetch("6.1.0-50-amd64", lambda text: None) == there


@needs_dpkg
def test_a_kernel_is_split_into_packages() -> None:
    found = chosen("trixie-backports", "7.2")
    assert found is not None
    assert found.names == (
        "linux-binary-7.2.13+deb14-amd64",
        "linux-modules-7.2.13+deb14-amd64",
        "linux-base-7.2.13+deb14-amd64",
    )


@needs_dpkg
def test_newest_seven_is_there_unsigned_only() -> None:
    found = chosen("trixie-backports", "7.x")
    assert found is not None
    assert found.release == "7.3.4+deb13-amd64"
    assert found.names[0] == "linux-binary-unsigned-7.3.4+deb13-amd64"


@needs_dpkg
def test_a_kernel_that_is_not_split_yet() -> None:
    found = chosen("trixie-backports", "6.18")
    assert found is not None
    assert found.names == ("linux-image-6.18.15+deb13-amd64",)


def test_a_series_is_no_prefix() -> None:
    assert chosen("trixie", "6.1") is None
    assert chosen("trixie-backports", "5.19") is None


def test_all_series_are_in_order_of_their_numbers() -> None:
    names = (RECORDED / "trixie-backports.names").read_text().split()
    assert all_series(names)[:4] == ["6.16", "6.17", "6.18", "6.19"]
    assert all_series(["linux-image-6.2.1-amd64", "linux-image-6.12.1-amd64"]) == ["6.2", "6.12"]


def test_sources_of_a_machine_whose_lists_were_never_updated() -> None:
    output = (
        "'http://archive.example/debian/dists/bookworm/InRelease' archive_InRelease 0 \n"
        "'http://archive.example/debian-security/dists/bookworm-security/InRelease' x 0 \n"
    )
    assert packages.parse_print_uris(output) == [
        Source("http://archive.example/debian/", "bookworm"),
        Source("http://archive.example/debian-security/", "bookworm-security"),
    ]


MACHINE = [
    Source("http://other.example/apt/", "cloud-bookworm"),
    Source("http://archive.example/debian/", "bookworm"),
    Source("http://archive.example/debian/", "bookworm-updates"),
    Source("http://archive.example/debian-security/", "bookworm-security"),
]


def test_sources_are_other_suites_in_the_archives_of_this_machine() -> None:
    text = packages.sources_for(("trixie", "trixie-security"), MACHINE)
    assert "URIs: http://archive.example/debian/\nSuites: trixie\n" in text
    assert "URIs: http://archive.example/debian-security/\nSuites: trixie-security\n" in text
    assert "other.example" not in text


def test_without_a_security_archive_the_plain_one_has_to_do() -> None:
    assert "security" not in packages.sources_for(("trixie", "trixie-security"), MACHINE[:2])


def test_without_a_debian_source_nothing_can_be_fetched() -> None:
    with pytest.raises(CannotRun, match="no Debian package source"):
        packages.sources_for(("trixie",), MACHINE[:1])


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("Err:1 http://a trixie\n  Could not resolve 'a'\nE: Failed to fetch x\n", "be reached"),
        ("W: Failed to fetch x  Temporary failure resolving 'a'\n", "be reached"),
        ("E: Write error - write (28: No space left on device)\n", "no space left"),
        ("E: The repository 'http://a x Release' is not signed.\n", "is not signed"),
        ("", "no message"),
    ],
)
def test_failures_of_apt_are_told_apart(stderr: str, expected: str) -> None:
    with pytest.raises(CannotRun, match=expected):
        raise packages.apt_failure(("apt-get", "update"), stderr)


def test_no_space_is_found_before_the_download(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="no space in"):
        packages.check_space(tmp_path, 1 << 60)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache.cache_directory()


def test_a_fetched_kernel_serves_when_the_archive_does_not(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> Path:
        raise CannotRun("the Debian archive cannot be reached")

    (kernels / "debian" / "6.12.1-amd64").mkdir(parents=True)
    packages._write(kernels / "series" / "6.12.json", '{"release": "6.12.1-amd64"}')
    monkeypatch.setattr(packages, "FRESH_S", -1.0)
    monkeypatch.setattr(packages, "_fetch_newest", fail)
    told: list[str] = []
    assert packages.fetch("6.12", told.append).name == "6.12.1-amd64"
    assert "fetched earlier" in told[0]
    with pytest.raises(CannotRun, match="cannot be reached"):
        packages.fetch("6.1", told.append)


def test_what_a_killed_unpacking_left_is_removed(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> Path:
        raise UsageError("Debian has no such kernel")

    left = kernels / "debian" / ".unpacking-x"
    left.mkdir(parents=True)
    monkeypatch.setattr(packages, "_fetch_newest", refuse)
    with pytest.raises(UsageError):
        packages.fetch("5.19", lambda text: None)
    assert not left.exists()
