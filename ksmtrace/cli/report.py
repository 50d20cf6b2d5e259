"""``ksmtrace report``."""

import click


@click.command()
def report() -> None:
    """Report."""
