"""Which source package the kernel's own tests come from, and what is taken out of its archive."""

import io
import shutil
import tarfile

import pytest

from ksmtrace.errors import CannotRun
from ksmtrace.vm import cache, selftests

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg") is None, reason="dpkg compares versions")

# As apt-cache madison told of Debian 13 and its backports.
VERSIONS = [
    ("linux-source-6.12", "6.12.107-1"),
    ("linux-source-6.12", "6.12.117-1"),
    ("linux-source", "6.12.117-1"),
    ("linux-source-7.2", "7.2.13-1~bpo13+1"),
    ("linux-source-7.3", "7.3.4-1~bpo13+1"),
]


@needs_dpkg
@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ("6.12", ("linux-source-6.12", "6.12.117-1")),
        ("7.x", ("linux-source-7.3", "7.3.4-1~bpo13+1")),
        ("6.1", None),
    ],
)
def test_the_newest_source_of_a_series(series, expected) -> None:
    found = selftests.choose_source(series, VERSIONS)
    assert (found and (*found.names, found.version)) == expected


def test_only_what_the_tests_are_built_from_is_unpacked() -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("Makefile", "mm/gup_test.h", "drivers/gpu/x.c", "toolshed/y", "tools/z.c"):
            archive.addfile(tarfile.TarInfo(f"linux-source-6.12/{name}"))
    content.seek(0)
    with tarfile.open(fileobj=content) as archive:
        wanted = [member.name.partition("/")[2] for member in selftests._wanted(archive)]
    assert wanted == ["Makefile", "mm/gup_test.h", "tools/z.c"]


def test_what_was_built_once_is_taken_from_the_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = cache.cache_directory("selftests") / "6.12"
    built.mkdir()
    assert selftests.fetch_selftests("6.12") == built


def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    def download(series, scratch, notify):
        archive = scratch / "source"
        (archive / "tools/testing/selftests/mm").mkdir(parents=True)
        (archive / "tools/testing/selftests/mm/ksm_functional_tests.c").touch()
        (archive / "Makefile").write_text(
            "headers:\n\t@echo 'x.c:1: error: no such thing' >&2; false\n"
        )
        return archive

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selftests, "_download", download)
    monkeypatch.setattr(selftests, "_unpack", lambda package, scratch: package)
    with pytest.raises(CannotRun, match=r"cannot be built: x.c:1: error: no such thing"):
        selftests.fetch_selftests("6.12")
    assert [path.name for path in cache.cache_directory("selftests").iterdir()] == ["lock"]
