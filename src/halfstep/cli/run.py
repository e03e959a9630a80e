"""``halfstep run``: any training script, unmodified, in a recipe."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfstep.cli.program import run_program, when_loaded
from halfstep.cli.statuses import MISUSE, NO
from halfstep.errors import HalfstepError, OperandError
from halfstep.recipe import Recipe

if TYPE_CHECKING:
    from halfstep.switching.emulation import EmulatedScript
    from halfstep.switching.launcher import Launcher

__all__ = ["Launch", "run_script"]


class Launch(BaseException):
    """Carries a program past the command line's own handlers, to be run where nothing is around it."""

    def __init__(self, job: Callable[[], None]) -> None:
        super().__init__()
        self.job = job


def run_script(
    script: Annotated[
        str, typer.Argument(help="The script, or with -m the module.", show_default=False)
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="What the script is given; options too.", show_default=False),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="A name or a text that `halfstep recipes` understands.")
    ] = "fp16",
    is_module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is a module, as in `python -m`.")
    ] = False,
    emulated: Annotated[
        bool,
        typer.Option(
            "--emulate",
            help="Emulate the recipe in every operation, the optimizer's too, instead of switching models.",
        ),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write a page: steps, skipped steps, loss scale.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the same to this file for a program.")
    ] = None,
    audited: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="At the end, how each weight, gradient and moment was held; 1 if a promise was broken.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No summary at the end.")] = False,
) -> None:
    """Any PyTorch training script, unmodified, trains in a recipe.

    Models are found when they are called; the script's optimizers, autocast and GradScaler may be there or
    not. The script sees itself run as by python: its arguments, its exit status, its tracebacks. At the end
    a summary is written to stderr. Leaves with the script's status, or with 1 if nothing was switched.
    With --emulate any recipe runs, whatever computes: functions without a model, the optimizer. It is slower.

    On several processes: torchrun --nproc-per-node 2 -m halfstep run train.py

    Example: halfstep run --recipe bf16 train.py --epochs 3
    """
    parsed = Recipe.parse(recipe)
    if not is_module and not Path(script).exists():
        raise OperandError(f"there is no file {script}; give a script, or -m and a module")
    if audited and emulated:
        raise OperandError(
            "--audit looks at switched models, and with --emulate none is switched; leave out one of the two"
        )
    page, record = (None if path is None else _writable(path) for path in (report, json_file))
    if page is not None and importlib.util.find_spec("plotly") is None:
        raise HalfstepError(
            "--report needs plotly, which is not installed: pip install 'halfstep[report]'"
        )
    if os.environ.get("RANK", "0") == "0":  # torchrun's word for the first of its processes
        process = _Process(parsed, emulated, audited, page=page, record=record, quiet=quiet)
    else:
        process = _Process(parsed, emulated, audited, page=None, record=None, quiet=True)

    def job() -> None:
        when_loaded("torch", process.torch_is_there)
        run_program(script, arguments or (), is_module=is_module, at_end=process.end)

    raise Launch(job)


class _Process:
    """One launched process: what is put into torch once the script has imported it, and its summary."""

    def __init__(
        self,
        recipe: Recipe,
        emulated: bool,
        audited: bool,
        *,
        page: Path | None,
        record: Path | None,
        quiet: bool,
    ) -> None:
        self._recipe = recipe
        self._emulated = emulated
        self._audited = audited
        self._page = page
        self._record = record
        self._quiet = quiet
        self._launcher: Launcher | EmulatedScript | None = None

    def torch_is_there(self) -> None:
        """Look for models from now on, or emulate."""
        from halfstep.switching.emulation import EmulatedScript
        from halfstep.switching.launcher import Launcher

        try:
            if self._emulated:
                self._launcher = EmulatedScript(self._recipe)
            else:
                self._launcher = Launcher(self._recipe, audited=self._audited)
        except HalfstepError as error:  # the script may catch it on its way
            print(f"halfstep: {error}", file=sys.stderr)
            sys.exit(MISUSE)
        self._launcher.install()

    def end(self, failed: bool) -> int:
        """Say what was done; the status for a script that did not fail."""
        launcher = self._launcher
        if launcher is None:
            if not self._quiet:
                done = "emulated" if self._emulated else "switched"
                print(f"halfstep: nothing was {done}: no torch was imported", file=sys.stderr)
            return NO
        from halfstep.switching.run_summary import RunSummary

        summary = launcher.summary()
        if not summary.found and not failed:
            _wait_for_threads()
            summary = launcher.summary()
        if not self._quiet:
            print(summary, file=sys.stderr)
            if self._audited and isinstance(summary, RunSummary) and summary.models:
                print(summary.audit(), file=sys.stderr)
        if self._record is not None:
            text = json.dumps(summary.as_dict(), indent=1)
            self._record.write_text(text + "\n", encoding="utf-8")
        if self._page is not None:
            from halfstep.diagnosis.page import write_whole
            from halfstep.diagnosis.run_page import build_emulation_page, build_page

            text = (
                build_page(summary, sys.argv)
                if isinstance(summary, RunSummary)
                else build_emulation_page(summary, sys.argv)
            )
            write_whole(self._page, text)
        broken = isinstance(summary, RunSummary) and summary.broken
        return 0 if summary.found and not broken else NO


def _wait_for_threads() -> None:
    """Python would, before it leaves: a thread may train."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()


def _writable(file: Path) -> Path:
    """``file``, absolute (the script may change its folder); refused now, not after hours."""
    absolute = Path.cwd() / file
    folder = absolute.parent
    if absolute.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OperandError(
            f"{file} cannot be written; give the name of a file in a folder that is there"
        )
    return absolute
