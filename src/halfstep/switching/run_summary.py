"""What a launched script came to: the models that were switched, their steps, what was found besides."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from halfstep.switching.audit_table import Audit
from halfstep.switching.explanation import Explanation
from halfstep.switching.met import Handling, described

__all__ = ["LeftAlone", "ModelRun", "RunSummary", "SkippedStep"]

_MODELS_SHOWN = 6
_NOTHING = (
    "nothing was switched: no torch.nn.Module was called with parameters that an optimizer holds or that "
    "require grad. Models are found when they are called, model(x), in this process: not in those that the "
    "script starts (see torchrun in `halfstep run --help`)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedStep:
    """A step that was not applied: its number from 1, its scale, and whose gradients were not finite."""

    step: int
    loss_scale: float
    nonfinite: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRun:
    """One switched model and what became of its steps.

    ``scales`` has (step, loss scale) for the first step and each at which the scale had moved; it is empty
    where no step was counted. ``skips`` has the first thousand of the ``skipped`` steps. ``audits`` has the
    last audit; it is empty where none was asked for, and where no step was applied while the model was there.
    """

    name: str
    device: str
    optimizers: tuple[str, ...]
    steps: int
    skipped: int
    scales: tuple[tuple[int, float], ...]
    skips: tuple[SkippedStep, ...]
    audits: tuple[Audit, ...] = ()

    def __str__(self) -> str:
        if not self.optimizers:
            return (
                f"{self.name}, updated without an optimizer object: no step to skip, loss scale 1"
            )
        text = f"{self.name}, {'+'.join(self.optimizers)}: {_count(self.steps, 'step')}"
        text += f", {self.skipped} skipped" if self.skipped else ", none skipped"
        low = min((scale for _, scale in self.scales), default=1.0)
        high = max((scale for _, scale in self.scales), default=1.0)
        if high == 1.0:
            return text
        return f"{text}; loss scale {_scale(low)}" + (f" to {_scale(high)}" if low != high else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftAlone:
    """A trained model that was not switched, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A launched script in numbers; prints as the few lines that ``halfstep run`` ends with."""

    recipe: str
    models: tuple[ModelRun, ...]
    left: tuple[LeftAlone, ...]
    explanations: tuple[Explanation, ...]
    """One a device: which operations run natively, which emulated, which in FP32."""
    unlisted: dict[str, Handling]
    """Operations in no list (a library's own) that the models called, and what was done with them."""
    backwards: int
    """Calls of ``backward()`` and ``torch.autograd.grad``, whatever model they were of."""
    autocast: bool
    """The script entered ``torch.autocast``."""
    grad_scaler: bool
    """The script used a ``torch.amp.GradScaler``."""

    @property
    def found(self) -> bool:
        """True where a model was switched."""
        return bool(self.models)

    def __str__(self) -> str:
        if self.models:
            executors = [_executors(explanation) for explanation in self.explanations]
            lines = [f"recipe {self.recipe}, {'; '.join(executors)}", *self._model_lines()]
            lines.append(_count(self.backwards, "backward pass", "backward passes"))
            lines += [described(self.unlisted)] if self.unlisted else []
        elif self.left:
            lines = ["nothing was switched"]
        else:
            lines = [_NOTHING]
        lines += [f"left as it is: {it.name}, {it.reason}" for it in self.left]
        if self.autocast and self.models:
            lines.append("the script's torch.autocast: inside the models the recipe decides")
        if self.grad_scaler and self.models:
            lines.append("the script's GradScaler: at 1, the recipe does the loss scaling")
        return "\n".join(f"halfstep: {line}" for line in lines)

    @property
    def broken(self) -> bool:
        """True where an audit found a promise of the recipe that is not kept."""
        return any(audit.broken for model in self.models for audit in model.audits)

    def audit(self) -> str:
        """The table of each model that was audited, and which were not."""
        lines: list[str] = []
        for model in self.models:
            for audit in model.audits:
                lines += [f"audit of {model.name}", *str(audit).splitlines()]
            if not model.audits:
                lines.append(f"no audit of {model.name}: it was gone before a step was applied")
        return "\n".join(f"halfstep: {line}" for line in lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        record = dataclasses.asdict(self)
        for model, plain in zip(self.models, record["models"], strict=True):
            plain["audits"] = [audit.as_dict() for audit in model.audits]
        for explanation in record["explanations"]:
            for row in explanation["rows"]:
                row["executor"] = row["executor"].value
        record["unlisted"] = {name: how.value for name, how in self.unlisted.items()}
        return record

    def _model_lines(self) -> list[str]:
        counted = Counter(str(model) for model in self.models)
        lines = [text if n == 1 else f"{n} x {text}" for text, n in counted.items()]
        if len(lines) > _MODELS_SHOWN:
            more = len(lines) - _MODELS_SHOWN
            lines[_MODELS_SHOWN:] = [f"and {more} more (--report and --json have them all)"]
        return lines


def _executors(explanation: Explanation) -> str:
    """Which kinds of operations are emulated on a device, and which run in FP32."""
    rows = explanation.rows
    emulated = [row.kind.partition(" (")[0] for row in rows if row.executor.value == "emulated"]
    text = f"{', '.join(emulated)} emulated" if emulated else "native"
    wide = [row.kind for row in rows if row.writes == "fp32" and row.reads != "fp32"]
    return f"{text} on {explanation.device}" + (f"; in FP32: {'; '.join(wide)}" if wide else "")


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _scale(value: float) -> str:
    return str(int(value)) if value >= 1 and value.is_integer() and value < 2**24 else f"{value:g}"
