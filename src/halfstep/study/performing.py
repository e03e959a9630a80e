"""Jobs performed side by side under one progress bar, every result written down as it comes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from halfstep.study import workers
from halfstep.study.runs import Outcome, Run, append_line
from halfstep.study.tasks import Job, perform

__all__ = ["perform_all"]


def perform_all(
    jobs: Sequence[Job], finished: dict[int, Run], lines: Path, console: Console
) -> None:
    """Perform ``jobs``, a process a core; each run goes into ``finished`` by its number, and to
    ``lines``.

    A job that raises, or whose process dies, gives a run that says so; the others go on.
    """
    shares: dict[int, float] = {}
    figures: dict[int, str] = {}
    columns = (
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(bar_width=16),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}"),
    )
    with (
        workers.Workers(_processes(), perform) as pool,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        bar = progress.add_task("starting", total=sum(job.cost for job in jobs))
        for event in pool.run(jobs):
            job = jobs[event.job]
            match event:
                case workers.Started():
                    shares[event.job], figures[event.job] = 0.0, ""
                case workers.Progressed():
                    shares[event.job] = event.share
                    figures[event.job] = (
                        "" if event.figure != event.figure else f" ({event.figure:.0f}% wrong)"
                    )
                case workers.Done():
                    finished[event.job] = event.result
                case workers.Raised():
                    console.print(event.trace, style="dim", markup=False, highlight=False)
                    finished[event.job] = _failed(job, event.message)
                case workers.Died():
                    reason = f"its process ended with exit status {event.exit_code}"
                    finished[event.job] = _failed(job, reason)
            if event.job in finished:
                shares[event.job] = 1.0
                append_line(lines, finished[event.job])
                console.print(_line(finished[event.job]), highlight=False)
            running = [
                f"{_short(jobs[number])} {100 * share:.0f}%{figures[number]}"
                for number, share in shares.items()
                if number not in finished
            ]
            progress.update(
                bar,
                completed=sum(jobs[number].cost * share for number, share in shares.items()),
                description=" · ".join(running),
            )


def _processes() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, 8))


def _short(job: Job) -> str:
    return f"{job.experiment.variant.value} {job.experiment.seed}:"


def _failed(job: Job, reason: str) -> Run:
    return Run(experiment=job.experiment, outcome=Outcome.FAILED, reason=reason)


def _line(run: Run) -> str:
    title = f"{run.experiment.task}, {run.experiment.variant.value}, seed {run.experiment.seed}"
    if run.outcome is Outcome.FINISHED:
        return f"{title}: {run.error:.1f}% wrong, {run.steps} steps in {run.seconds:.0f} s"
    return f"{title}: {run.outcome.value} at step {run.steps}: {run.reason}"
