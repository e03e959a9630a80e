"""The command line: ``halfstep --help``. It parses, calls and prints; torch is imported late."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import halfstep
from halfstep.cli import bench, lab
from halfstep.cli.catalogues import list_formats, list_recipes
from halfstep.cli.demo import show_demo
from halfstep.cli.statuses import MISUSE
from halfstep.errors import HalfstepError

__all__ = ["app", "main"]

app = typer.Typer(
    name="halfstep",
    help="Mixed-precision training by one switch, and the arithmetic behind it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(show_demo)
app.command("formats")(list_formats)
app.command("recipes")(list_recipes)
app.add_typer(lab.group, name="lab")
app.add_typer(bench.group, name="bench")


def main() -> None:
    """The ``halfstep`` command; leaves with status 0 done, 1 the answer is no, 2 misuse."""
    try:
        app()
    except HalfstepError as error:
        print(f"halfstep: {error}", file=sys.stderr)
        sys.exit(MISUSE)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"halfstep {halfstep.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """The options that go before a command."""
