"""What an emulated program came to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["EmulationSummary"]

_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulationSummary:
    """Operations by class, and steps; prints as a few lines."""

    recipe: str
    operations: dict[str, dict[str, int]]
    """class -> operation -> how often."""
    steps: int
    """Steps of optimizers."""
    skipped_steps: int
    loss_scales: tuple[float, float]
    """The least and the greatest of the steps; 1 and 1 where there was none."""
    unknown: tuple[str, ...]
    """Operations that no list knows."""
    autocast: bool
    """The program entered ``torch.autocast``: it had no effect."""
    grad_scaler: bool
    """The program used a GradScaler beside a recipe that scales by itself: it was off."""

    @property
    def found(self) -> bool:
        """True where there was an operation."""
        return bool(self.operations)

    def __str__(self) -> str:
        total = sum(sum(counts.values()) for counts in self.operations.values())
        lines = [f"recipe {self.recipe}: {total} operations emulated"]
        for kind, counts in self.operations.items():
            names = [f"{name.removeprefix('aten.')} {n}" for name, n in counts.items()]
            more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{kind}: {sum(counts.values())} ({', '.join(names[:_SHOWN])}{more})")
        if self.steps:
            low, high = self.loss_scales
            scale = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            lines.append(f"{self.steps} steps, {self.skipped_steps} skipped, loss scale {scale}")
        if self.unknown:
            lines.append(
                f"in no list, so computed in FP32 and rounded once: {', '.join(self.unknown)}"
            )
        if self.autocast:
            lines.append("the program's torch.autocast had no effect: the recipe decides")
        if self.grad_scaler:
            lines.append("the program's GradScaler was off: the recipe does the loss scaling")
        return "\n".join(f"halfstep: {line}" for line in lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return dataclasses.asdict(self)
