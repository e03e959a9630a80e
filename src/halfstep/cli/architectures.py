"""``halfstep bench architectures``: published models that were not written for halfstep."""

from __future__ import annotations

import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from halfstep.cli.printing import AsJson, make_console, print_json
from halfstep.cli.statuses import NO
from halfstep.errors import HalfstepError, UnknownNameError
from halfstep.recipe import Recipe

if TYPE_CHECKING:
    from halfstep.study.architectures.outcomes import Outcome

__all__ = ["bench_architectures"]

_NEEDED = ("transformers", "diffusers", "scipy")
_WIDTHS = (30, 18, 7, 10, 18, 9, 6, 3)
_HEADINGS = ("architecture", "kind", "recipe", "1 - cosine", "loss: fp32", "off", "run", "met")


def bench_architectures(
    recipe: Annotated[
        list[str] | None, typer.Option(help="A recipe to train in; may be given again.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="This architecture; may be given again.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes side by side; 0 is one a core.")] = 0,
    resume: Annotated[
        Path | None,
        typer.Option(help="Keep every row in this file, and do not measure those it has."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Also write the record to this folder, as .json and .md."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Published architectures, small and untrained, 20 steps each, by the switch and by `halfstep run`.

    A row is good where nothing failed, the first gradient points where FP32's does (cosine at least
    0.999 in fp16, 0.99 in bf16, 0.95 in 8 bits), the loss after 20 steps lies where one more FP32 seed
    would (its distance from five of them, in units of their spread: at most 4.60, Student's t at 99%),
    and both ways of switching give the same losses, bit for bit. Leaves with status 1 if one is not.

    Needs pip install 'halfstep[architectures]'; nothing else is downloaded.

    Example: halfstep bench architectures --recipe bf16 --only bert --only unet-2d
    """
    for library in _NEEDED:
        if importlib.util.find_spec(library) is None:
            raise HalfstepError(
                f"the architectures need {library}, which is not installed: "
                "pip install 'halfstep[architectures]'"
            )
    from halfstep.study.architectures.catalogue import ARCHITECTURES
    from halfstep.study.architectures.runner import Resumed, outcomes
    from halfstep.study.benchmarks.harness import this_machine

    recipes = [str(Recipe.parse(text)) for text in recipe or ("fp16", "bf16")]
    for name in only or ():
        if name not in ARCHITECTURES:
            raise UnknownNameError("architecture", name, list(ARCHITECTURES))
    names = only or list(ARCHITECTURES)
    machine = this_machine("cpu")
    console = Console(stderr=True) if as_json else make_console()
    rows: list[Outcome] = []
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    _print_line(console, _HEADINGS, "bold")
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(names) * len(recipes))
        found = outcomes(names, recipes, jobs=jobs or _cores(), resumed=Resumed(resume))
        for row in found:
            rows.append(row)
            _print_row(console, row)
            failed = sum(not row.met for row in rows)
            progress.update(bar, advance=1, description=f"{failed} not met" if failed else "")
    rows.sort(key=lambda row: (names.index(row.architecture), recipes.index(row.recipe)))
    if as_json:
        print_json({"machine": machine.as_dict(), "rows": [row.as_dict() for row in rows]})
    if save:
        from halfstep.study.architectures.writing import save_outcomes

        command = f"halfstep {shlex.join(sys.argv[1:])}"
        for path in save_outcomes(rows, machine, command=command, directory=save):
            print(f"written: {path}", file=sys.stderr)
    if not all(row.met for row in rows):
        raise typer.Exit(NO)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print_row(console: Console, row: Outcome) -> None:
    cells = (
        row.architecture,
        row.kind,
        row.recipe,
        _number(1 - row.cosine, ".1e"),
        f"{_number(row.after, '.4f')}: {_number(row.fp32[0] if row.fp32 else math.nan, '.4f')}",
        _number(row.deviation, "+.2f"),
        "same" if row.same else "differs",
        "yes" if row.met else "no",
    )
    _print_line(console, cells, "green" if row.met else "red")
    if row.error:
        console.print(f"  {row.error}", style="red", markup=False, highlight=False)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _print_line(console: Console, cells: Sequence[str], style: str) -> None:
    table = Table.grid(padding=(0, 2))
    for width in _WIDTHS:
        table.add_column(width=width)
    table.add_row(*cells, style=style)
    console.print(table)
