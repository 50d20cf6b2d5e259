"""The command line: parses, calls one layer down, prints; the only room with click in it."""

from __future__ import annotations

import os
import sys

import click

from ksmtrace import __version__
from ksmtrace.cli.check import check
from ksmtrace.cli.doctor import doctor
from ksmtrace.cli.record import record
from ksmtrace.cli.report import report
from ksmtrace.cli.selftest import selftest
from ksmtrace.cli.sites import sites
from ksmtrace.cli.top import top
from ksmtrace.cli.tree import tree
from ksmtrace.cli.vm import vm
from ksmtrace.cli.workload import workload
from ksmtrace.errors import KsmtraceError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ksmtrace")
def ksmtrace() -> None:
    """Make Linux KSM (kernel samepage merging) observable.

    \b
    Example:
      ksmtrace doctor                      what can be seen on this kernel
      ksmtrace record -d 60 -o host.ksmt   record one minute
      ksmtrace report host.ksmt            and read what happened
      ksmtrace top                         watch it as it happens

    \b
    Exit status: 0 fine; 1 a claim is violated or a test failed; 2 wrong usage; 3 cannot run
    here; 4 skipped as a whole; 5 unreadable recording.
    """


for _command in (doctor, record, report, check, selftest, top, tree, workload, vm, sites):
    ksmtrace.add_command(_command)


def main() -> None:
    """Run the command line and end the process with the documented status."""
    status = 0
    try:
        result = ksmtrace.main(prog_name="ksmtrace", standalone_mode=False)
        status = result if isinstance(result, int) else 0
    except KsmtraceError as error:
        tell(error)
        status = error.exit_status
    except click.exceptions.Exit as leave:
        status = leave.exit_code
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("ksmtrace: interrupted", err=True)
        status = 130
    except BrokenPipeError:
        status = _reader_gone()
    except SystemExit as leave:
        # Click's own answer to a closed pipe is 1, which here means that a claim is violated.
        if leave.code != 1:
            raise
        status = _reader_gone()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = _reader_gone()
    sys.exit(status)


def _reader_gone() -> int:
    # The reader of our output has gone, as `| head` does: nobody is left to tell.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 141


def tell(error: KsmtraceError) -> None:
    """Write an error and its hint to stderr, a line each."""
    click.echo(f"ksmtrace: {error}", err=True)
    if error.hint:
        click.echo(f"HINT: {error.hint}", err=True)
