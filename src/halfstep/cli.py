"""The command line: ``halfstep --help``."""

from __future__ import annotations

from typing import Annotated

import typer

import halfstep

__all__ = ["app", "main"]

app = typer.Typer(
    name="halfstep",
    help="Mixed-precision training by one switch, and the arithmetic behind it.",
    no_args_is_help=True,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"halfstep {halfstep.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """The options that go before a command."""


def main() -> None:
    """The `halfstep` command."""
    app()
