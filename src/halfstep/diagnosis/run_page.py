"""The page of a launched script: what was switched, which steps were skipped, how the loss scale moved."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import plotly.graph_objects as go

from halfstep.diagnosis.page import Card, Page, Tone, figure, note, paragraph, table
from halfstep.diagnosis.plots import COLOURS, binary_axis, styled
from halfstep.recipe import Treatment
from halfstep.switching.emulation import EmulationSummary
from halfstep.switching.run_summary import ModelRun, RunSummary

__all__ = ["build_emulation_page", "build_page"]

_SKIPS_SHOWN = 100


def build_page(summary: RunSummary, arguments: Sequence[str]) -> str:
    """One self-contained HTML document. ``arguments``: the script's ``sys.argv``."""
    page = Page(kicker="halfstep run", title=f"{shlex.join(arguments)} in {summary.recipe}")
    page.cards(_cards(summary))
    lines = [line.removeprefix("halfstep: ") for line in str(summary).splitlines()]
    page.verdict("What was done", lines, warning=not summary.models)
    for number, model in enumerate(summary.models):
        if model.scales:
            page.section(f"{model.name}: steps", *_steps(model, f"scale{number}"))
    for explanation in summary.explanations:
        head = ("operations", "executor", "reads", "adds in", "writes", "why")
        rows = [
            (r.kind, r.executor.value, r.reads, r.accumulates, r.writes, r.why)
            for r in explanation.rows
        ]
        page.section(f"The recipe on {explanation.device}", table(head, rows))
    return page.html()


def build_emulation_page(summary: EmulationSummary, arguments: Sequence[str]) -> str:
    """The page of ``halfstep run --emulate``: operations by class, steps."""
    page = Page(
        kicker="halfstep run --emulate", title=f"{shlex.join(arguments)} in {summary.recipe}"
    )
    total = sum(sum(counts.values()) for counts in summary.operations.values())
    page.cards(
        [
            Card(
                label="operations",
                figure=str(total),
                detail="each emulated",
                tone=Tone.GOOD if total else Tone.BAD,
            ),
            Card(label="optimizer steps", figure=str(summary.steps), detail="of all optimizers"),
            Card(
                label="skipped",
                figure=str(summary.skipped_steps),
                detail="gradients were not finite",
            ),
        ]
    )
    lines = [line.removeprefix("halfstep: ") for line in str(summary).splitlines()]
    page.verdict("What was done", lines, warning=not total)
    for kind, counts in summary.operations.items():
        rows = [(name.removeprefix("aten."), str(n)) for name, n in counts.items()]
        page.section(
            f"{kind}: {Treatment(kind).why}", table(("operation", "calls"), rows, numbers=(1,))
        )
    return page.html()


def _cards(summary: RunSummary) -> list[Card]:
    steps = sum(model.steps for model in summary.models)
    skipped = sum(model.skipped for model in summary.models)
    names = ", ".join(dict.fromkeys(model.name for model in summary.models))
    return [
        Card(
            label="models switched",
            figure=str(len(summary.models)),
            detail=names or "none was found",
            tone=Tone.GOOD if summary.models else Tone.BAD,
        ),
        Card(label="optimizer steps", figure=str(steps), detail="each model's, added up"),
        Card(label="skipped", figure=str(skipped), detail="gradients overflowed at the loss scale"),
        Card(label="backward passes", figure=str(summary.backwards), detail="of all models"),
    ]


def _steps(model: ModelRun, name: str) -> list[str]:
    """The loss scale over the steps, and each step that was skipped."""
    ends = [*(step for step, _ in model.scales[1:]), model.steps + 1]
    plot = go.Figure()
    plot.add_scatter(
        x=[x for (step, _), end in zip(model.scales, ends, strict=True) for x in (step, end - 1)],
        y=[scale for _, scale in model.scales for _ in range(2)],
        mode="lines",
        name="loss scale",
        line={"color": COLOURS[0]},
    )
    plot.add_scatter(
        x=[skip.step for skip in model.skips],
        y=[skip.loss_scale for skip in model.skips],
        mode="markers",
        name="skipped",
        marker={"color": COLOURS[2], "size": 8},
    )
    shown = model.skips[:_SKIPS_SHOWN]
    rows = [(str(skip.step), f"{skip.loss_scale:g}", _worst(skip.nonfinite)) for skip in shown]
    styled(plot, x="step", y="loss scale")
    binary_axis(plot.update_yaxes, [scale for _, scale in model.scales])
    bodies = [paragraph(str(model)), figure(plot, name)]
    if rows:
        head = ("step", "loss scale", "inf or NaN in the gradient of")
        bodies.append(table(head, rows, numbers=(0, 1)))
    if model.skipped > len(shown):
        bodies.append(note(f"The first {len(shown)} of {model.skipped} skipped steps."))
    return bodies


def _worst(nonfinite: dict[str, int]) -> str:
    first = ", ".join(f"{name} ({count})" for name, count in list(nonfinite.items())[:3])
    more = len(nonfinite) - 3
    return f"{first} and {more} more" if more > 0 else first
