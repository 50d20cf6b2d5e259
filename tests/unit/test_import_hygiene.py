"""What a command imports: the heavy and the privileged libraries only where they are used."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import ksmtrace

HEAVY = {"bcc", "matplotlib", "pandas", "textual", "pyroute2", "numpy", "pyarrow"}


def modules_after(code: str) -> set[str]:
    """Run code in a fresh interpreter; return the top-level modules that are loaded after it."""
    report = (
        "import atexit, json, sys\n"
        "def tell():\n"
        "    names = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "    print('\\n' + json.dumps(names))\n"
        "atexit.register(tell)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", report + code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return set(names)


def modules_after_command(*arguments: str) -> set[str]:
    """Run ksmtrace's entry point with these arguments in a fresh interpreter."""
    return modules_after(
        f"sys.argv = {['ksmtrace', *arguments]!r}\nfrom ksmtrace.cli import main\nsys.exit(main())"
    )


def library_modules() -> list[str]:
    """Every module of ksmtrace but the command line and the terminal UI."""
    return [
        module.name
        for module in pkgutil.walk_packages(ksmtrace.__path__, "ksmtrace.")
        if not module.name.startswith(("ksmtrace.cli", "ksmtrace.tui"))
        and not module.name.endswith("__main__")
    ]


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    assert not modules_after("import ksmtrace.cli") & HEAVY


def test_help_loads_nothing_heavy() -> None:
    assert not modules_after_command("--help") & HEAVY


def test_report_help_loads_neither_bcc_nor_textual() -> None:
    assert not modules_after_command("report", "--help") & {"bcc", "textual"}


def test_shell_completion_loads_nothing_heavy() -> None:
    # Completion runs the program at every press of the tab key.
    loaded = modules_after(
        "import os\n"
        "os.environ.update(_KSMTRACE_COMPLETE='bash_complete', COMP_WORDS='ksmtrace ',"
        " COMP_CWORD='1')\n"
        "sys.argv = ['ksmtrace']\n"
        "from ksmtrace.cli import main\n"
        "main()"
    )
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", library_modules())
def test_a_library_module_imports_alone(name: str) -> None:
    loaded = modules_after(f"import {name}")
    assert not loaded & {"bcc", "click", "matplotlib", "textual"}
