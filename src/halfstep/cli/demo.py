"""``halfstep demo``: the main job on real data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from halfstep.errors import HalfstepError

__all__ = ["TaskName", "show_demo"]

# Choices are spelled out, not imported: the enumerations live beside torch, which --help should
# not load. A test compares them.
TaskName = Annotated[
    Literal["auto", "speech", "handwriting"],
    typer.Option(help="What to read; auto is speech where its data can be fetched."),
]


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
