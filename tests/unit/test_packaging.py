"""The wheel holds what the tree holds: pyproject's explicit list of packages can rot."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where the packages lie in the tree, and where an installation has them.
PACKAGE_DIRECTORIES = {"ksmtrace": "ksmtrace", "bpf": "ksmtrace/bpf", "tui": "ksmtrace/tui"}


def tree_files() -> set[str]:
    """Every file under the package directories, as the wheel should name it."""
    return {
        f"{installed}/{path.relative_to(ROOT / directory)}"
        for directory, installed in PACKAGE_DIRECTORIES.items()
        for path in (ROOT / directory).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: a build leaves directories behind, and would take files from earlier ones.
    source = tmp_path_factory.mktemp("source") / "tree"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "tests", "*.ksmt")
    shutil.copytree(ROOT, source, ignore=skipped)
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "--disable-pip-version-check", "--wheel-dir", str(target), str(source)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("ksmtrace-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run_installed(installed: Path, code: str) -> str:
    """Run code where only the wheel's ksmtrace can be found, not the checkout's."""
    # The editable installation's finder comes after the path, so the wheel wins; the assertion
    # says so if that ever changes.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(installed)!r}); import ksmtrace\n"
            f"assert ksmtrace.__file__.startswith({str(installed)!r}), ksmtrace.__file__\n" + code,
        ],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("ksmtrace/")}
    assert packed == tree_files()


def test_the_wheel_brings_only_ksmtrace(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ksmtrace"}


@pytest.mark.parametrize("package", ["ksmtrace.bpf", "ksmtrace.tui", "ksmtrace.cli"])
def test_a_package_is_imported_from_the_wheel(installed: Path, package: str) -> None:
    code = f"import importlib; print(importlib.import_module({package!r}).__file__)"
    assert run_installed(installed, code).startswith(str(installed))


def test_the_c_sources_are_found_in_the_wheel(installed: Path) -> None:
    found = run_installed(
        installed,
        "from importlib.resources import files\n"
        "for entry in files('ksmtrace.bpf').iterdir(): print(entry.name)",
    ).split()
    wanted = {path.name for path in (ROOT / "bpf").iterdir() if path.suffix in {".c", ".h"}}
    assert wanted and wanted <= set(found)


def test_the_entry_point_is_there_after_installation(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "ksmtrace = ksmtrace.cli:main" in archive.read(entry).decode()
