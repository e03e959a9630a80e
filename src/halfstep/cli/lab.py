"""``halfstep lab``: experiments on arithmetic alone, the published figure beside ours."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from halfstep.cli.printing import AsJson, make_console, print_json
from halfstep.cli.statuses import NO
from halfstep.errors import HalfstepError

if TYPE_CHECKING:
    from halfstep.study.lab.results import Result

__all__ = ["group"]

group = typer.Typer(
    no_args_is_help=True,
    help="Experiments on arithmetic alone: the published figure beside the one measured here.",
)

Seed = Annotated[int, typer.Option(min=0, help="Of all random numbers of the experiment.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="Also write a self-contained page with plots to this file."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--output", help="Also write the page lab.html to this folder."),
]


@group.command("swamping")
def show_swamping(seed: Seed = 0, output: Output = None, as_json: AsJson = False) -> None:
    """Sums of 65,536 numbers of mean 1: what each accumulator keeps of them.

    In fp32, fp16, e6m9 and bf16; and in e6m9 stochastically, in chunks of 64, pairwise, with
    Kahan's correction. Leaves with status 1 if a published finding was not reproduced.

    Example: halfstep lab swamping --output swamping.html
    """
    _perform(["swamping"], seed, output, as_json)


@group.command("dot-length")
def show_dot_length(seed: Seed = 0, output: Output = None, as_json: AsJson = False) -> None:
    """Dot products of 16 to 65,536 terms: how the error grows, by accumulator and order.

    Leaves with status 1 if an error exceeds its bound or grows by another law than published.

    Example: halfstep lab dot-length --output dot-length.html
    """
    _perform(["dot-length"], seed, output, as_json)


@group.command("promotion")
def show_promotion(seed: Seed = 0, output: Output = None, as_json: AsJson = False) -> None:
    """FP8 products summed in the 14 bits of an H100, with and without promotion to FP32.

    Leaves with status 1 if a published finding was not reproduced.

    Example: halfstep lab promotion --output promotion.html
    """
    _perform(["promotion"], seed, output, as_json)


@group.command("updates")
def show_updates(seed: Seed = 0, output: Output = None, as_json: AsJson = False) -> None:
    """Weights that receive small updates: how much of an update arrives.

    For updates of 2^-5 to 2^-20 of the weight, each format and rounding. Leaves with status 1 if
    a published finding was not reproduced.

    Example: halfstep lab updates --output updates.html
    """
    _perform(["updates"], seed, output, as_json)


@group.command("formats")
def show_formats(seed: Seed = 0, output: Output = None, as_json: AsJson = False) -> None:
    """The number formats: reach, spacing, number line.

    Leaves with status 1 if a limit is not the published one.

    Example: halfstep lab formats --output formats.html
    """
    _perform(["formats"], seed, output, as_json)


@group.command("all")
def show_all(seed: Seed = 0, output: Folder = None, as_json: AsJson = False) -> None:
    """Every experiment, on one page.

    Leaves with status 1 if a published finding was not reproduced.

    Example: halfstep lab all --output lab
    """
    from halfstep.study.lab.catalogue import EXPERIMENTS

    page = None
    if output is not None:
        if output.exists() and not output.is_dir():
            raise HalfstepError(f"--output {output} is a file; give the name of a folder")
        page = output / "lab.html"
    _perform(list(EXPERIMENTS), seed, page, as_json)


def _perform(names: Sequence[str], seed: int, output: Path | None, as_json: bool) -> None:
    from halfstep.study.lab.catalogue import EXPERIMENTS

    if output is not None:
        _check_page(output)
    console, started = make_console(), time.perf_counter()
    results: list[Result] = []
    with Console(stderr=True).status("") as status:
        for name in names:
            status.update(f"halfstep lab {name} ...")
            results.append(EXPERIMENTS[name](seed))
            if not as_json:
                _print_result(console, results[-1])
    if as_json:
        _print_plain(results)
    if output is not None:
        _write_page(output, results, time.perf_counter() - started)
        Console(stderr=True).print(f"The page: {output}", soft_wrap=True)
    if not all(result.reproduced for result in results):
        raise typer.Exit(NO)


def _check_page(output: Path) -> None:
    """Raise now, not after the experiments."""
    from halfstep.diagnosis.page import check_writable

    if importlib.util.find_spec("plotly") is None:
        raise HalfstepError(
            "--output needs plotly, which is not installed: pip install 'halfstep[report]'"
        )
    check_writable(output)


def _write_page(output: Path, results: Sequence[Result], seconds: float) -> None:
    from halfstep.diagnosis.page import write_whole
    from halfstep.study.lab.page import build_page
    from halfstep.study.provenance import made_by

    write_whole(output, build_page(results, made_by(seconds)))


def _print_plain(results: Sequence[Result]) -> None:
    from halfstep.study.lab.results import as_plain

    plain: list[Any] = [as_plain(result) for result in results]
    print_json(plain[0] if len(plain) == 1 else plain)


def _print_result(console: Console, result: Result) -> None:
    from halfstep.study.lab.writing import interval, number

    table = Table(box=None, header_style="bold")
    for heading in ("claim", "published", "here", "allowed", "same", "source"):
        table.add_column(heading)
    sources = list(dict.fromkeys(finding.source for finding in result.findings))
    for finding in result.findings:
        table.add_row(
            finding.claim,
            finding.published,
            number(finding.ours),
            interval(finding),
            "yes" if finding.reproduced else "no",
            str(1 + sources.index(finding.source)),
            style="" if finding.reproduced else "red",
        )
    console.print(result.title, style="bold")
    console.print(table)
    for place, source in enumerate(sources, 1):
        console.print(f"{place}: {source}", style="dim", highlight=False)
    console.print(result.lesson, end="\n\n", highlight=False)
