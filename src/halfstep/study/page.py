"""The demo's page: what was trained, what came of it, and what the difference is made of."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halfstep.diagnosis.page import Card, Page, Tone, note, paragraph, table
from halfstep.study.runs import Outcome, Run, Variant
from halfstep.study.sections import (
    FP16,
    Runs,
    costs,
    curves,
    digits_alone,
    examples,
    finals,
    gradients,
    layers,
    spread_of,
    updates,
)
from halfstep.study.tasks import RAISED_EPS
from halfstep.study.verdict import (
    Parity,
    compare,
    cost_sentence,
    finished_errors,
    gradient_sentence,
    loss_scale_exponent,
    mixed_sentence,
    why,
)

__all__ = ["Story", "build_page", "headline"]

_GLOSSARY = (
    (Variant.FP32, "plain PyTorch: every number has 32 bits", "fp32"),
    (
        Variant.MIXED,
        "16-bit storage and multiplication, 32-bit addition and weights, gradients scaled",
        "fp16",
    ),
    (
        Variant.NO_MASTER,
        "as mixed precision, but the weights are rounded to 16 bits after every update",
        "fp16-nomaster",
    ),
    (
        Variant.NAIVE,
        "everything in 16 bits: weights, gradients, optimizer; no scale",
        "fp16-naive",
    ),
    (
        Variant.NAIVE_RAISED,
        f"the same, but for Adam's eps: raised from 1e-8 to {RAISED_EPS:g}",
        "fp16-naive",
    ),
)

_TONES = {Parity.SAME: Tone.GOOD, Parity.WORSE: Tone.BAD, Parity.UNDECIDED: Tone.PLAIN}
_IN_FULL = {Variant.NO_MASTER: "mixed precision without its FP32 master copy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """All that the page tells: the runs of one invocation, and what they were.

    ``reader`` are the runs of the recogniser, ``digits`` those of the isolated cause; ``what``
    says in a sentence what is read; ``notes`` are what a reader must know first; ``missing`` names
    what was not run, and is empty for a whole report; ``machine`` are the lines of the footer.
    """

    what: str
    corpus: str
    reader: tuple[Run, ...]
    digits: tuple[Run, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    machine: tuple[str, ...]


def headline(story: Story) -> str:
    """The title: what the comparison of mixed precision with FP32 came to."""
    runs = _by_variant(story.reader)
    result = compare(runs.get(Variant.FP32, []), runs.get(Variant.MIXED, []))
    if not finished_errors(runs.get(Variant.MIXED, [])):
        return "Training a recogniser in 32 and in 16 bits: no mixed-precision run finished"
    if result.parity is Parity.WORSE:
        return "Mixed precision did not train this recogniser as well as FP32"
    if result.parity is Parity.SAME:
        naive = runs.get(Variant.NAIVE, [])
        broken = [run.steps for run in naive if run.outcome is Outcome.NOT_FINITE]
        end = f"; naive 16-bit, set the same, broke at step {broken[0]}" if broken else ""
        return f"In mixed precision the recogniser reads as well as in FP32{end}"
    return "Training a recogniser in FP32, in mixed precision and in naive 16-bit"


def build_page(story: Story) -> str:
    """The whole HTML document of ``story``."""
    page = Page(kicker="halfstep demo", title=headline(story))
    if story.missing:
        page.verdict(
            "This report is partial",
            [f"Not in it: {name}." for name in story.missing],
            warning=True,
        )
    if story.notes:
        page.verdict("Read this first", story.notes, warning=True)
    reader, digits = _by_variant(story.reader), _by_variant(story.digits)
    page.cards(_cards(reader, digits))
    page.verdict("What the runs say", _sentences(reader, digits))
    page.section(
        "What was trained",
        paragraph(story.what),
        paragraph(story.corpus),
        table(
            ("name here", "what it is", "recipe"),
            [(variant.value, text, recipe) for variant, text, recipe in _GLOSSARY],
        ),
        note(
            "Hyper-parameters were chosen for FP32 on the development part and kept for every "
            "recipe; the test part was read once, at the end of each run."
        ),
    )
    for title, bodies in (
        ("Learning curves", curves(reader)),
        ("How well it reads in the end", finals(reader)),
        ("Why a scale is needed: where gradients lie", gradients(reader)),
        ("Why a master copy is needed: updates that vanish", updates(reader)),
        ("The cause alone: digits, plain SGD, a small step", digits_alone(digits)),
        ("What it costs: time and bytes", costs(reader)),
        ("What was read", examples(reader)),
        ("Layer by layer", layers(reader)),
    ):
        if bodies:
            page.section(title, *bodies)
    page.footer(story.machine)
    return page.html()


def _by_variant(runs: Sequence[Run]) -> Runs:
    found = {variant: [r for r in runs if r.experiment.variant is variant] for variant in Variant}
    return {variant: some for variant, some in found.items() if some}


def _cards(reader: Runs, digits: Runs) -> Iterator[Card]:
    for variant, runs in reader.items():
        errors = finished_errors(runs)
        stopped = [run for run in runs if run.outcome is not Outcome.FINISHED]
        parity = compare(reader.get(Variant.FP32, []), runs).parity
        if errors:
            yield Card(
                label=variant.value,
                figure=f"{statistics.fmean(errors):.1f}%",
                detail=f"characters wrong on held-out sentences ({spread_of(errors)})",
                tone=Tone.PLAIN if variant is Variant.FP32 else _TONES[parity],
            )
        elif stopped:
            yield Card(
                label=variant.value,
                figure=stopped[0].outcome.value,
                detail=f"stopped at step {stopped[0].steps}",
                tone=Tone.BAD,
            )
    base, other = digits.get(Variant.FP32, []), digits.get(Variant.NO_MASTER, [])
    if finished_errors(base) and finished_errors(other):
        gap = statistics.fmean(finished_errors(other)) - statistics.fmean(finished_errors(base))
        yield Card(
            label="digits without the master copy",
            figure=f"{-gap:+.1f} points",
            detail="accuracy against FP32, plain SGD at a small step",
            tone=Tone.BAD if compare(base, other).parity is Parity.WORSE else Tone.PLAIN,
        )


def _sentences(reader: Runs, digits: Runs) -> Iterator[str]:
    base = reader.get(Variant.FP32, [])
    yield mixed_sentence(base, reader.get(Variant.MIXED, []))
    for variant in (Variant.NAIVE, Variant.NAIVE_RAISED):
        if variant in reader:
            yield why(variant.value.capitalize(), base, reader[variant], score="CER")
    for variant in (Variant.MIXED, Variant.NO_MASTER, Variant.NAIVE):
        if variant in digits and digits.get(Variant.FP32):
            name = f"On digits, {_IN_FULL.get(variant, variant.value)}"
            yield why(name, digits[Variant.FP32], digits[variant], score="of digits wrong")
    if base:
        yield gradient_sentence(
            base, FP16, scale=loss_scale_exponent(reader.get(Variant.MIXED, []))
        )
        if Variant.MIXED in reader:
            yield cost_sentence(base, reader[Variant.MIXED])
