"""The sections of the demo's page: each the plots and tables of one question, empty if nothing
answers it.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from difflib import SequenceMatcher

import torch

from halfstep.diagnosis.footprint import Footprint
from halfstep.diagnosis.page import figure, note, paragraph, table
from halfstep.diagnosis.plots import (
    COLOURS,
    binades,
    bytes_held,
    lines,
    loss_by_scale,
    percent,
    points_with_means,
    power,
)
from halfstep.diagnosis.statistics import Exponents, reach, total
from halfstep.study.runs import Outcome, Run, Variant
from halfstep.study.verdict import finished_errors, loss_scale_exponent

__all__ = [
    "FP16",
    "Runs",
    "costs",
    "curves",
    "digits_alone",
    "examples",
    "finals",
    "gradients",
    "layers",
    "spread_of",
    "updates",
]

FP16 = reach(torch.float16)
COLOUR = {variant.value: colour for variant, colour in zip(Variant, COLOURS, strict=False)}
Runs = dict[Variant, list[Run]]
"""Runs by variant, in the order they are shown; a variant without runs is absent."""


def spread_of(errors: Sequence[float]) -> str:
    """How many seeds, and from which figure to which."""
    if len(errors) < 2:
        return f"{len(errors)} seed"
    return f"{len(errors)} seeds, {min(errors):.1f} to {max(errors):.1f}"


def curves(reader: Runs) -> list[str]:
    """Error and loss against the step."""

    def series(value: str) -> dict[str, list[tuple[list[float], list[float]]]]:
        return {
            variant.value: [
                ([p.step for p in run.curve], [getattr(p, value) for p in run.curve])
                for run in runs
                if run.curve
            ]
            for variant, runs in reader.items()
            if any(run.curve for run in runs)
        }

    if not series("error"):
        return []
    error = lines(
        series("error"), x="step", colours=COLOUR, y="characters wrong (development part)"
    )
    error.update_yaxes(ticksuffix="%", rangemode="tozero")
    loss = lines(series("loss"), x="step", colours=COLOUR, y="training loss (CTC, nats a sentence)")
    loss.update_yaxes(type="log")
    silent = [v.value for v, runs in reader.items() if not any(run.curve for run in runs)]
    absent = f" No curve: {', '.join(silent)} (stopped before its first point)." if silent else ""
    return [
        paragraph(
            "One line a seed. Runs with the same seed see the same sentences in the same order."
            + absent
        ),
        figure(error, "curve-error"),
        figure(loss, "curve-loss"),
    ]


def finals(reader: Runs) -> list[str]:
    """Test error by variant, and every run in a table."""
    errors = {variant.value: finished_errors(runs) for variant, runs in reader.items()}
    rows = [
        (
            variant.value,
            str(run.experiment.seed),
            run.outcome.value,
            f"{run.steps}",
            f"{run.error:.1f}%" if run.outcome is Outcome.FINISHED else "-",
            f"{run.skipped}",
            f"{run.seconds:.0f} s",
        )
        for variant, runs in reader.items()
        for run in runs
    ]
    head = ("variant", "seed", "ended", "steps", "test CER", "steps skipped", "time")
    bodies = [table(head, rows, numbers=(3, 4, 5, 6))]
    if any(errors.values()):
        plot = points_with_means(errors, colours=COLOUR, y="character error rate (test part)")
        bodies.insert(0, figure(plot, "final-error"))
    return bodies


def gradients(reader: Runs) -> list[str]:
    """Binades of the gradients against the reach of FP16, and what a loss scale saves."""
    runs = [run for run in reader.get(Variant.FP32, []) if run.evidence.samples]
    if not runs:
        return []
    scale = loss_scale_exponent(reader.get(Variant.MIXED, []))
    weights = total(run.evidence.weight_gradients for run in runs)
    inner = total(run.evidence.activation_gradients for run in runs)
    kinds = {"gradients of weights": weights, "gradients of activations": inner}

    def row(name: str, seen: Exponents) -> tuple[str, ...]:
        return (
            name,
            percent(seen.zero_share),
            percent(seen.lost_share(FP16)),
            percent(seen.lost_share(FP16, scale=scale)),
            percent(100 * seen.subnormal(FP16) / max(1, seen.nonzero)),
            percent(100 * seen.overflown(FP16, scale=scale) / max(1, seen.nonzero)),
        )

    return [
        paragraph(
            "FP16 has no number between 0 and 2⁻²⁴. Every gradient the FP32 runs computed (all "
            "layers, sampled over the whole training) is put in the bin of its power of two; red "
            "bars are those that FP16 would turn into zero. Multiplying the loss by a power of "
            "two moves the whole histogram to the right, into the range, at no loss: the dotted "
            "outline."
        ),
        figure(binades(weights, FP16, scale=scale), "binades"),
        table(
            (
                "",
                "zero already in FP32",
                "lost by FP16",
                f"lost with scale {power(scale)}",
                "subnormal (fewer bits)",
                f"too large with scale {power(scale)}",
            ),
            [row(name, seen) for name, seen in kinds.items()],
            numbers=range(1, 6),
        ),
        figure(loss_by_scale(kinds, FP16, chosen=scale), "loss-by-scale"),
        note(
            "Shares are of the values that are not zero: a zero that FP32 computed is no loss of "
            "FP16. Gradients of activations are those at the outputs of the layers."
        ),
    ]


def updates(reader: Runs) -> list[str]:
    """Share of updates that 16-bit weights swallow, over the training."""
    series = {
        variant.value: [
            (
                [sample.step for sample in run.evidence.samples],
                [sample.updates.swallowed_share for sample in run.evidence.samples],
            )
            for run in runs
            if len(run.evidence.samples) > 1
        ]
        for variant, runs in reader.items()
    }
    series = {name: curves for name, curves in series.items() if curves}
    if not series:
        return []
    plot = lines(series, x="step", colours=COLOUR, y="updates swallowed by FP16 weights")
    plot.update_yaxes(ticksuffix="%", rangemode="tozero")
    return [
        paragraph(
            "An FP16 number has 11 significant bits: adding less than about 1/2048 of a weight to "
            "it changes nothing. For FP32 and mixed precision the curve says what would have been "
            "swallowed if the weights had been 16-bit: their 32-bit master copy kept it. For "
            "naive 16-bit it says which weights did not move although their gradient was not zero."
        ),
        figure(plot, "swallowed"),
    ]


def digits_alone(digits: Runs) -> list[str]:
    """The ablation on digits."""
    accuracy = {v.value: [100 - e for e in finished_errors(runs)] for v, runs in digits.items()}
    if not any(accuracy.values()):
        return []
    plot = points_with_means(accuracy, colours=COLOUR, y="accuracy (1,000 test digits)")
    lowest = min(min(values) for values in accuracy.values() if values)
    plot.update_yaxes(range=[max(0.0, lowest - 10), 100])
    rows = []
    for variant, runs in digits.items():
        errors = finished_errors(runs)
        seen = [run.evidence for run in runs if run.evidence.samples]
        if errors and seen:
            early = statistics.fmean(e.samples[0].updates.swallowed_share for e in seen)
            late = statistics.fmean(e.updates(last=0.25).swallowed_share for e in seen)
            loss = statistics.fmean(run.curve[-1].loss for run in runs if run.curve)
            rows.append(
                (
                    variant.value,
                    f"{100 - statistics.fmean(errors):.1f}%",
                    spread_of([100 - error for error in errors]),
                    f"{loss:.3f}",
                    f"{early:.0f}% → {late:.0f}%",
                )
            )
    return [
        paragraph(
            "A two-layer network on 5,000 real MNIST digits, plain SGD, learning rate 0.001: as "
            "small as the last steps of any schedule. No Adam, no recurrence, nothing to blame "
            "but the arithmetic; the variants differ in one thing at a time."
        ),
        figure(plot, "digits"),
        table(
            (
                "variant",
                "accuracy",
                "spread",
                "training loss at the end",
                "updates swallowed, first → last",
            ),
            rows,
            numbers=(1, 3, 4),
        ),
        note("The axis of the picture does not begin at zero."),
    ]


def costs(reader: Runs) -> list[str]:
    """Time of a step, and the bytes it holds."""
    held = {
        variant.value: next(run.footprint for run in runs if run.footprint is not None)
        for variant, runs in reader.items()
        if variant is not Variant.NAIVE_RAISED and any(run.footprint for run in runs)
    }
    times = {
        variant.value: [run.step_ms for run in runs if run.step_ms == run.step_ms]
        for variant, runs in reader.items()
    }
    times = {name: values for name, values in times.items() if values}
    bodies = []
    if times:
        plot = points_with_means(
            times, colours=COLOUR, y="ms a step (median of a run)", suffix=" ms"
        )
        bodies += [
            figure(plot, "step-time"),
            note(
                "This processor has no FP16 multiplier that PyTorch uses for training: FP16 is "
                "reproduced here by rounding, so these times say what the rehearsal costs, not "
                "what 16-bit hardware would save. Runs were made side by side, one thread each."
            ),
        ]
    if held:
        rows = [
            (name, *(f"{size / 2**20:.2f}" for size in _sizes(footprint)))
            for name, footprint in held.items()
        ]
        head = ("MiB", "weights", "16-bit copies", "gradients", "optimizer", "activations", "total")
        bodies += [
            figure(bytes_held(held), "bytes"),
            table(head, rows, numbers=range(1, 7)),
            note(
                "With Adam, mixed precision keeps as many bytes a weight as FP32, and the 16-bit "
                "copies more: what it saves is activations, and only there. Measured on one batch."
            ),
        ]
    return bodies


def _sizes(held: Footprint) -> list[int]:
    return [
        held.weights,
        held.working,
        held.gradients,
        held.optimizer,
        held.activations,
        held.total,
    ]


def examples(reader: Runs, count: int = 8) -> list[str]:
    """What was said and what was read, errors marked."""
    shown = {v: next((r for r in runs if r.examples), None) for v, runs in reader.items()}
    shown = {variant: run for variant, run in shown.items() if run is not None}
    if not shown:
        return []
    sentences = [example.reference for example in next(iter(shown.values())).examples]
    step = max(1, len(sentences) // count)
    rows = []
    for index in list(range(0, len(sentences), step))[:count]:
        reference = sentences[index]
        cells = [f"<b>{html.escape(reference)}</b>"]
        for run in shown.values():
            cells.append(_marked(reference, run.examples[index].recognised))
        rows.append(cells)
    head = ("said", *(variant.value for variant in shown))
    return [
        paragraph(
            "Every few sentences of the test part, seed 0, as read; what is wrong is marked."
        ),
        table(head, rows, raw=True),
    ]


def _marked(reference: str, recognised: str) -> str:
    if not recognised:
        return "<mark>(nothing)</mark>"
    pieces = []
    matcher = SequenceMatcher(a=reference, b=recognised, autojunk=False)
    for kind, start, end, begin, stop in matcher.get_opcodes():
        text = html.escape(recognised[begin:stop])
        missing = "·" * (end - start) if kind == "delete" else ""
        pieces.append(text if kind == "equal" else f"<mark>{text or missing}</mark>")
    return "".join(pieces)


def layers(reader: Runs) -> list[str]:
    """Losses and swallowed updates by layer, of one FP32 run."""
    run = next((run for run in reader.get(Variant.FP32, []) if run.evidence.layers), None)
    if run is None:
        return []
    scale = loss_scale_exponent(reader.get(Variant.MIXED, []))
    rows = []
    for layer in run.evidence.layers:
        if layer.updates.attempted:
            weights, inner = layer.weight_gradients, layer.activation_gradients
            rows.append(
                (
                    layer.name,
                    percent(weights.lost_share(FP16)),
                    percent(weights.lost_share(FP16, scale=scale)),
                    percent(inner.lost_share(FP16)),
                    percent(layer.updates.swallowed_share),
                )
            )
    head = (
        "layer (FP32, seed 0)",
        "weight gradients lost by FP16",
        f"with scale {power(scale)}",
        "gradients of its output lost",
        "updates FP16 weights would swallow",
    )
    return [table(head, rows, numbers=range(1, 5))]
