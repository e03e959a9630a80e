"""The command line: ``halfstep --help``. It parses, calls and prints; torch is imported late."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import halfstep
from halfstep.cli import architectures, bench, lab
from halfstep.cli.catalogues import list_formats, list_recipes
from halfstep.cli.demo import show_demo
from halfstep.cli.run import Launch, run_script
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
app.command("run", context_settings={"allow_interspersed_args": False})(run_script)
app.command("formats")(list_formats)
app.command("recipes")(list_recipes)
app.add_typer(lab.group, name="lab")
bench.group.command("architectures")(architectures.bench_architectures)
app.add_typer(bench.group, name="bench")


def main() -> None:
    """The ``halfstep`` command; leaves with status 0 done, 1 the answer is no, 2 misuse."""
    printing = sys.excepthook
    job = _nothing
    try:
        app()
    except HalfstepError as error:
        print(f"halfstep: {error}", file=sys.stderr)
        sys.exit(MISUSE)
    except Launch as launch:
        job = launch.job
    sys.excepthook = printing  # Typer puts its own there
    job()


def _nothing() -> None:
    return None


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
