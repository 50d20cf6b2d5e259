"""``ksmtrace sites``: recipes for observing functions that a kernel build has inlined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksmtrace.cli.table import render_table
from ksmtrace.errors import KsmtraceError

if TYPE_CHECKING:
    from ksmtrace.capture.sites import Recipe


@click.group()
def sites() -> None:
    """Recipes: where functions that a kernel build has inlined can still be observed.

    A recipe serves exactly one build of the kernel, told by its build-id.

    \b
    Example:
      ksmtrace sites list
      ksmtrace sites resolve ~/linux/vmlinux
    """


@sites.command()
@click.argument("vmlinux", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write to this directory; default ~/.local/share/ksmtrace/recipes.",
)
def resolve(vmlinux: Path, output: Path | None) -> None:
    """Make the recipe of the build that VMLINUX is of.

    VMLINUX is the linked kernel with debug information: the file beside your own build, or the one
    in Debian's linux-image-RELEASE-dbg. Takes some seconds, and needs perf. Prints the recipe's
    path.

    \b
    Example:
      ksmtrace sites resolve ~/linux/vmlinux
      ksmtrace sites resolve /usr/lib/debug/boot/vmlinux-$(uname -r)
    """
    from ksmtrace.capture.resolve import resolve as resolve_vmlinux
    from ksmtrace.capture.sites import user_directory, write_recipe

    recipe = resolve_vmlinux(vmlinux)
    path = write_recipe(recipe, output or user_directory())
    click.echo(str(path))
    functions = sorted({site.function for site in recipe.sites})
    click.echo(
        f"{recipe.release or 'kernel'}, build-id {recipe.build_id}: {len(recipe.sites)} sites "
        f"({', '.join(functions)}), {len(recipe.calls)} calls",
        err=True,
    )


@sites.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def list_recipes(as_json: bool) -> None:
    """List the recipes: those that come with ksmtrace, and this user's own.

    The one of the running kernel is marked with *. A recipe of one's own goes before a shipped one.

    \b
    Example:
      ksmtrace sites list --json | jq .running_has_recipe
    """
    from ksmtrace.capture.sites import read_recipe, shipped_recipes, user_recipe_files
    from ksmtrace.kernel.facts import read_facts

    running = read_facts(probe=False).kernel.build_id
    rows: list[tuple[Recipe, Path | None]] = []
    refused: list[tuple[Path, str]] = []
    for path in user_recipe_files():
        try:
            rows.append((read_recipe(path), path))
        except KsmtraceError as error:
            refused.append((path, str(error)))
    rows += [(recipe, None) for recipe in shipped_recipes()]
    has_recipe = None if running is None else any(row[0].build_id == running for row in rows)
    if as_json:
        document = {
            "running_build_id": running,
            "running_has_recipe": has_recipe,
            "recipes": [_plain(recipe, path) for recipe, path in rows],
            "refused": [{"file": str(path), "reason": reason} for path, reason in refused],
        }
        click.echo(json.dumps(document, indent=2))
        return
    heads = ("", "release", "version", "build-id", "sites", "calls", "from")
    cells = [
        (
            "*" if recipe.build_id == running else "",
            recipe.release,
            recipe.version,
            recipe.build_id,
            str(len(recipe.sites)),
            str(len(recipe.calls)),
            "ksmtrace" if path is None else str(path),
        )
        for recipe, path in rows
    ]
    for line in render_table(heads, cells, left=(0, 1, 2, 3, 6)):
        click.echo(line)
    for _, reason in refused:
        click.echo(f"ksmtrace: {reason}", err=True)
    if not has_recipe:
        click.echo("The running kernel has no recipe.", err=True)


def _plain(recipe: Recipe, path: Path | None) -> dict[str, Any]:
    return {
        "build_id": recipe.build_id,
        "release": recipe.release,
        "version": recipe.version,
        "sites": sorted({site.function for site in recipe.sites}),
        "calls": len(recipe.calls),
        "file": None if path is None else str(path),
    }
