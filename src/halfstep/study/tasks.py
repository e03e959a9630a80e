"""The demo's work: which experiments, with which hyper-parameters, and how one is performed."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from halfstep.study.corpus import Corpus, load_speech
from halfstep.study.digits import Digits, DigitsPlan, load_digits, train_digits
from halfstep.study.driving import Tell
from halfstep.study.handwriting import load_handwriting
from halfstep.study.runs import Experiment, Run, Variant
from halfstep.study.training import Plan, train_recognizer

__all__ = ["DIGITS", "RAISED_EPS", "Job", "Size", "Task", "jobs_for", "load_corpus", "perform"]

DIGITS = "digits"
_SEEDS_RAISED = 2  # two have a spread; a third is two minutes
RAISED_EPS = 1e-4  # the smallest power of ten in FP16's normal range
# The recipe behind a variant, and its share of the work (an FP32 run of the recogniser is 1).
_RECIPES = {
    Variant.FP32: ("fp32", 1.0),
    Variant.MIXED: ("fp16", 1.3),
    Variant.NO_MASTER: ("fp16-nomaster", 1.3),
    Variant.NAIVE: ("fp16-naive", 1.3),
    Variant.NAIVE_RAISED: ("fp16-naive", 1.3),
}


class Task(Enum):
    """What the recogniser reads."""

    SPEECH = "speech"
    HANDWRITING = "handwriting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much work: seeds a recipe, and steps of the recogniser and of the digits."""

    seeds: int
    steps: int
    digit_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An experiment with all that a worker needs to perform it; ``cost`` is its share
    of the work.
    """

    experiment: Experiment
    plan: Plan = field(default_factory=lambda: Plan(steps=1))
    digits: DigitsPlan = field(default_factory=DigitsPlan)
    cache: Path
    cost: float


def jobs_for(task: Task, size: Size, cache: Path) -> list[Job]:
    """The demo's jobs, in the order they are begun: what fails at once first, then seed by seed."""
    plan = Plan(steps=size.steps, probe_every=max(2, min(25, size.steps // 3)))
    digits = DigitsPlan(steps=size.digit_steps, probe_every=max(2, min(100, size.digit_steps // 3)))

    def reader(variant: Variant, seed: int, **options: float) -> Job:
        recipe, cost = _RECIPES[variant]
        experiment = Experiment(
            task=task.value, recipe=recipe, seed=seed, variant=variant, options=options
        )
        return Job(experiment=experiment, plan=plan, digits=digits, cache=cache, cost=cost)

    jobs = [dataclasses.replace(reader(Variant.NAIVE, 0), cost=0.02)]
    for seed in range(size.seeds):
        jobs += [
            reader(Variant.FP32, seed),
            reader(Variant.MIXED, seed),
        ]
        if seed < _SEEDS_RAISED:
            jobs.append(reader(Variant.NAIVE_RAISED, seed, eps=RAISED_EPS))
    for variant in (Variant.FP32, Variant.MIXED, Variant.NO_MASTER, Variant.NAIVE):
        recipe, _ = _RECIPES[variant]
        for seed in range(size.seeds):
            experiment = Experiment(task=DIGITS, recipe=recipe, seed=seed, variant=variant)
            jobs.append(
                Job(experiment=experiment, plan=plan, digits=digits, cache=cache, cost=0.06)
            )
    return jobs


def perform(job: Job, tell: Tell) -> Run:
    """Perform ``job``; data are loaded once a process."""
    if job.experiment.task == DIGITS:
        return train_digits(job.experiment, _digits(), job.digits, tell)
    corpus = load_corpus(Task(job.experiment.task), job.cache)
    return train_recognizer(job.experiment, corpus, job.plan, tell)


@functools.cache
def load_corpus(task: Task, cache: Path) -> Corpus:
    """The corpus of ``task``; fetched below ``cache`` if it is not there.

    Raises:
        DataError: it cannot be fetched or is not the one expected.
    """
    return load_speech(cache) if task is Task.SPEECH else load_handwriting()


@functools.cache
def _digits() -> Digits:
    return load_digits()
