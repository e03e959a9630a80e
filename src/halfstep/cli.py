"""The command line: ``halfstep --help``. It parses, calls and prints; torch is imported late."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

import halfstep
from halfstep.errors import HalfstepError
from halfstep.format import Format, formats
from halfstep.recipe import Recipe, recipes

if TYPE_CHECKING:
    from halfstep.study.benchmarks.harness import Machine, Row

__all__ = ["app", "format_record", "main", "recipe_record"]

# Exit statuses: 0 done, 1 the answer is no, 2 misuse, 130 interrupted.
NO = 1
MISUSE = 2

app = typer.Typer(
    name="halfstep",
    help="Mixed-precision training by one switch, and the arithmetic behind it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(no_args_is_help=True, help="Performance tables: a figure beside each target.")
app.add_typer(bench, name="bench")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
SaveTo = Annotated[
    Path | None,
    typer.Option("--save", help="Also write the record to this folder, as .json and .md."),
]


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


# Choices are spelled out, not imported: the enumerations live beside torch, which --help should
# not load. A test compares them.
TaskName = Annotated[
    Literal["auto", "speech", "handwriting"],
    typer.Option(help="What to read; auto is speech where its data can be fetched."),
]


@app.command("demo")
def show_demo(
    output: Annotated[Path, typer.Option(help="Where the page is written.")] = Path("report.html"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute, too short to learn: does it all work?")
    ] = False,
    task: TaskName = "auto",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="Also write what the page tells as JSON beside it.")
    ] = False,
) -> None:
    """A real recogniser in FP32, mixed precision and naive 16-bit, on a page that shows why.

    Ctrl-C leaves a page of what there is. Leaves with status 1 if mixed precision did worse than
    FP32.

    Example: halfstep demo --output report.html
    """
    try:
        from halfstep.study.demo import TaskChoice, demo
    except ModuleNotFoundError as error:
        raise HalfstepError(
            f"the demo needs {error.name}, which is not installed: pip install 'halfstep[study]'"
        ) from None

    status = demo(output, quick=quick, task=TaskChoice(task), seeds=seeds, write_json=as_json)
    raise typer.Exit(status)


@app.command("formats")
def list_formats(
    name: Annotated[str, typer.Argument(help="One format, in full.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """The number formats that have a name, or one format in full.

    Families need no entry: eXmY, intN and qI.F can be asked for by name.

    Example: halfstep formats e6m9
    """
    if name:
        _print_record(format_record(Format.parse(name)), as_json=as_json)
    else:
        _print_records([format_record(it) for it in formats().values()], _FORMAT_COLUMNS, as_json)


@app.command("recipes")
def list_recipes(
    name: Annotated[
        str, typer.Argument(help="One recipe, or a variant, in full.", show_default=False)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """The recipes that have a name, or one recipe in full.

    Example: halfstep recipes fp16:accumulate=fp16,master=fp16
    """
    if name:
        _print_record(recipe_record(Recipe.parse(name)), as_json=as_json)
    else:
        records = [recipe_record(it) for it in recipes().values()]
        _print_records(records, _RECIPE_COLUMNS, as_json)
        if not as_json:
            print()
            _print_records(records, ("name", "summary"), as_json)


Rounds = Annotated[int, typer.Option(min=1, help="Rounds in which all contestants take turns.")]
Device = Annotated[str, typer.Option(help="cpu, or a CUDA device such as cuda:0.")]
ClockName = Annotated[
    Literal["wall", "cpu"],
    typer.Option(help="wall, or CPU time on one thread for a machine that others keep busy."),
]


@bench.command("switch")
def bench_switch(
    device: Device = "cpu",
    rounds: Rounds = 15,
    clock: ClockName = "wall",
    save: SaveTo = None,
    as_json: AsJson = False,
) -> None:
    """Training steps of the switch against hand-written autocast and FP32.

    Leaves with status 1 if a target is missed.

    Example: halfstep bench switch --rounds 5
    """
    import torch

    from halfstep.study.benchmarks.harness import Clock, this_machine
    from halfstep.study.benchmarks.switch import rows

    if clock == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other would count as work
    measured = rows(device=device, rounds=rounds, clock=Clock(clock))
    _bench("switch", measured, this_machine(device, Clock(clock)), save, as_json)


@bench.command("rounding")
def bench_rounding(
    rounds: Rounds = 30, clock: ClockName = "wall", save: SaveTo = None, as_json: AsJson = False
) -> None:
    """Throughput of round_to against copy_ of the same tensors.

    Leaves with status 1 if a target is missed.

    Example: halfstep bench rounding --json
    """
    import torch

    from halfstep.study.benchmarks.harness import Clock, this_machine
    from halfstep.study.benchmarks.rounding import rows

    if clock == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other would count as work
    measured = rows(rounds=rounds, clock=Clock(clock))
    _bench("rounding", measured, this_machine("cpu", Clock(clock)), save, as_json)


# --- records: one source for tables, JSON and the pages under docs/ ------------------------------

_FORMAT_COLUMNS = ("name", "bits", "exponent", "mantissa", "max", "smallest", "eps", "inf", "nan")
_RECIPE_COLUMNS = ("name", "operands", "store", "accumulate", "master", "optimizer")
_RECIPE_COLUMNS += ("scaling", "policy")


def format_record(it: Format) -> dict[str, Any]:
    """What there is to say about a format, as plain values; NaN where a limit does not exist."""
    return {
        "name": it.name,
        "kind": it.kind.value,
        "bits": it.bits,
        "exponent": it.exponent_bits,
        "mantissa": it.mantissa_bits,
        "bias": it.bias,
        "max": it.max,
        "lowest": it.lowest,
        "smallest normal": it.smallest_normal,
        "smallest": it.smallest,
        "eps": it.eps,
        "inf": it.has_inf,
        "nan": it.has_nan,
        "overflow": it.overflow.value,
        "source": it.source,
    }


def recipe_record(it: Recipe) -> dict[str, Any]:
    """What there is to say about a recipe, as plain values."""
    operands = dict.fromkeys((it.weight.name, it.activation.name, it.gradient.name))
    scaling = dataclasses.asdict(it.loss_scaling) | {"kind": it.loss_scaling.kind.value}
    return {
        "name": it.name,
        "operands": "/".join(operands),
        "weight": it.weight.name,
        "activation": it.activation.name,
        "gradient": it.gradient.name,
        "store": it.store.name,
        "accumulate": it.accumulate.name,
        "master": it.master.name,
        "optimizer": it.optimizer.name,
        "scaling": it.loss_scaling.kind.value,
        "policy": it.policy.value,
        "guarded": it.guarded,
        "loss scaling": scaling,
        "summary": it.summary,
        "source": it.source,
    }


# --- printing ------------------------------------------------------------------------------------


def _console() -> Console:
    # Piped to a file, a table should not be folded at 80 columns.
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _print_record(record: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print_json(_plain(record))
        return
    table = Table(show_header=False, box=None)
    for key, value in record.items():
        table.add_row(key, cell(value))
    _console().print(table)


def _print_records(
    records: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool
) -> None:
    if as_json:
        _print_json([_plain(record) for record in records])
        return
    table = Table(*columns, box=None, header_style="bold")
    for record in records:
        table.add_row(*(cell(record[column]) for column in columns))
    _console().print(table)


def cell(value: object) -> str:
    """A value as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    return str(value)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON has it: null for a limit that does not exist."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in record.items()
    }


_BENCH_WIDTHS = (40, 30, 7, 13, 8, 3)


def _bench(
    theme: str, rows: Iterable[Row], machine: Machine, save: Path | None, as_json: bool
) -> None:
    from halfstep.study.benchmarks import harness

    measured: list[Row] = []
    console = _console()
    if not as_json:
        _print_line(console, ("case", "against", "figure", "quartiles", "target", "met"), "bold")
    for row in rows:
        measured.append(row)
        if not as_json:
            _print_row(console, row)
    if as_json:
        _print_json({"machine": machine.as_dict(), "rows": [row.as_dict() for row in measured]})
    if save:
        command = f"halfstep {shlex.join(sys.argv[1:])}"
        for path in harness.save(measured, machine, theme=theme, command=command, directory=save):
            print(f"written: {path}", file=sys.stderr)
    if not all(row.met for row in measured):
        raise typer.Exit(NO)


def _print_row(console: Console, row: Row) -> None:
    figure = row.figure
    cells = (
        row.case,
        row.against,
        f"{figure.median:.2f}",
        f"{figure.low:.2f}-{figure.high:.2f}",
        str(row.target),
        "yes" if row.met else "no",
    )
    _print_line(console, cells, "green" if row.met else "red")


def _print_line(console: Console, cells: Sequence[str], style: str) -> None:
    """One line of a table whose rows are printed as they come."""
    table = Table.grid(padding=(0, 2))
    for width in _BENCH_WIDTHS:
        table.add_column(width=width)
    table.add_row(*cells, style=style)
    console.print(table)
