"""``halfstep bench``: performance tables, a figure beside each target."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from halfstep.cli.printing import AsJson, make_console, print_json
from halfstep.cli.statuses import NO
from halfstep.study.benchmarks.groups import Group

if TYPE_CHECKING:
    from halfstep.study.benchmarks.harness import Machine, Row

__all__ = ["ClockName", "group"]

group = typer.Typer(no_args_is_help=True, help="Performance tables: a figure beside each target.")

SaveTo = Annotated[
    Path | None,
    typer.Option("--save", help="Also write the record to this folder, as .json and .md."),
]


Rounds = Annotated[int, typer.Option(min=1, help="Rounds in which all contestants take turns.")]
Device = Annotated[str, typer.Option(help="cpu, or a CUDA device such as cuda:0.")]
ClockName = Annotated[
    Literal["wall", "cpu"],
    typer.Option(help="wall, or CPU time on one thread for a machine that others keep busy."),
]
OnlyGroups = Annotated[
    list[Group] | None, typer.Option(help="This part of the table; may be given again.")
]


@group.command("switch")
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
    _print_table("switch", measured, this_machine(device, Clock(clock)), save, as_json)


@group.command("compile")
def bench_compile(
    device: Device = "cpu",
    rounds: Rounds = 15,
    clock: ClockName = "wall",
    save: SaveTo = None,
    as_json: AsJson = False,
) -> None:
    """Training steps under torch.compile: FP32 and switched, eager and compiled, in one run.

    Leaves with status 1 if a target is missed. Needs a C++ compiler, as torch.compile does.

    Example: halfstep bench compile --rounds 5
    """
    import torch

    from halfstep.study.benchmarks.compiled import rows
    from halfstep.study.benchmarks.harness import Clock, this_machine

    if clock == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other would count as work
    measured = rows(device=device, rounds=rounds, clock=Clock(clock))
    _print_table("compile", measured, this_machine(device, Clock(clock)), save, as_json)


@group.command("emulate")
def bench_emulate(
    device: Device = "cpu",
    rounds: Rounds = 5,
    clock: ClockName = "wall",
    save: SaveTo = None,
    as_json: AsJson = False,
) -> None:
    """Training steps of emulated recipes against the FP32 step of the same run.

    Leaves with status 1 if a target is missed.

    Example: halfstep bench emulate --rounds 3
    """
    import torch

    from halfstep.study.benchmarks.emulate import rows
    from halfstep.study.benchmarks.harness import Clock, this_machine

    if clock == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other would count as work
    measured = rows(device=device, rounds=rounds, clock=Clock(clock))
    _print_table("emulate", measured, this_machine(device, Clock(clock)), save, as_json)


@group.command("arithmetic")
def bench_arithmetic(
    rounds: Rounds = 15,
    only: OnlyGroups = None,
    clock: ClockName = "wall",
    save: SaveTo = None,
    as_json: AsJson = False,
) -> None:
    """Rounding against copy_, products in chosen accumulators against torch.mm, memory.

    Peers that are installed (pip install 'halfstep[peers]') have rows of their own. Leaves with
    status 1 if a target is missed.

    Example: halfstep bench arithmetic --only matmul --rounds 5
    """
    import torch

    from halfstep.study.benchmarks.arithmetic import rows
    from halfstep.study.benchmarks.harness import Clock, this_machine

    if clock == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other would count as work
    measured = rows(only=only or list(Group), rounds=rounds, clock=Clock(clock))
    _print_table("arithmetic", measured, this_machine("cpu", Clock(clock)), save, as_json)


@group.command("step")
def bench_step(
    parameters: Annotated[int, typer.Option(min=1000, help="How many, in 200 tensors.")] = 10**8,
    rounds: Rounds = 9,
    clock: ClockName = "wall",
    save: SaveTo = None,
    as_json: AsJson = False,
) -> None:
    """The optimizer's step in one pass, against the memory's bandwidth and torch's three passes.

    Takes 22 bytes a parameter. Leaves with status 1 if a target is missed.

    Example: halfstep bench step --parameters 10000000 --rounds 5
    """
    import torch

    from halfstep.study.benchmarks.harness import Clock, this_machine
    from halfstep.study.benchmarks.step import rows

    if clock == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other would count as work
    measured = rows(parameters=parameters, rounds=rounds, clock=Clock(clock))
    _print_table("step", measured, this_machine("cpu", Clock(clock)), save, as_json)


_BENCH_WIDTHS = (54, 40, 7, 13, 8, 3)


def _print_table(
    theme: str, rows: Iterable[Row], machine: Machine, save: Path | None, as_json: bool
) -> None:
    from halfstep.study.benchmarks import harness

    measured: list[Row] = []
    console = make_console()
    if not as_json:
        _print_line(console, ("case", "against", "figure", "quartiles", "target", "met"), "bold")
    for row in rows:
        measured.append(row)
        if not as_json:
            _print_row(console, row)
    if as_json:
        print_json({"machine": machine.as_dict(), "rows": [row.as_dict() for row in measured]})
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
