"""The optimizer's side: gradients that are not finite never reach it, 16-bit masters are rounded after it."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep import ops
from halfstep.errors import NonFiniteError
from halfstep.switching.loss_scale import StepReason

__all__ = ["Guard", "Owner", "not_finite_at_floor"]


class Owner(Protocol):
    """What a guard asks of its switch."""

    def name_of(self, parameter: Tensor) -> str:
        """The parameter's name in the model."""
        ...

    def noted(self, parameter: Tensor) -> int | None:
        """Values of its gradient that are not finite, where the backward has counted them."""
        ...

    def losses(self) -> list[Tensor]:
        """Roots of the backwards since the last step."""
        ...

    def at_floor(self) -> bool:
        """True where lowering the scale is not possible."""
        ...

    def scale(self) -> float:
        """The loss scale that the gradients were made with."""
        ...

    def report(self, applied: bool, reason: StepReason, nonfinite: dict[str, int]) -> None:
        """Note what became of a step, and move the scale."""
        ...

    def defers(self) -> bool:
        """True where a step's outcome may be learnt after it."""
        ...

    def report_later(self, bad: Tensor, names: list[str]) -> None:
        """Note a step whose outcome is on the device still: ``bad[k]`` for the gradient of ``names[k]``."""
        ...

    def round_masters(self, parameters: Iterable[Tensor]) -> None:
        """Round weights that the recipe keeps in 16 bits."""
        ...


class Guard:
    """Hooks around ``optimizer.step()``: check, skip or let pass, report.

    A step is skipped by showing the optimizer empty parameter groups for its length: gradients, state and
    the optimizer's own code stay as they are, and learning-rate schedulers see a step that was called.
    """

    def __init__(self, optimizer: Optimizer, owner: Owner, guarded: bool) -> None:
        self.optimizer = optimizer
        self._owner = owner
        self._guarded = guarded
        self._hidden: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._handed_over: tuple[Tensor, list[str]] | None = None
        self._verdict: tuple[bool, StepReason, dict[str, int]] = (True, StepReason.FINITE, {})
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        self._show()
        for handle in self._handles:
            handle.remove()

    def parameters(self) -> list[Tensor]:
        """All parameters that the optimizer holds now."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_nested(optimizer, sys._getframe(1)):
            return None
        self._show()  # an earlier step may have raised on its way
        if not self._guarded:
            self._verdict = (True, StepReason.UNGUARDED, {})
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is not None:
            self._verdict = (True, StepReason.FINITE, {})
            checked = self._checked(closure)
            if len(args) > 1:
                return (args[0], checked, *args[2:]), kwargs
            return args, {**kwargs, "closure": checked}
        if self._on_device():
            self._verdict = (True, StepReason.FINITE, {})
            self._hand_over()
            return None
        nonfinite = self._check()
        if nonfinite:
            self._verdict = (False, StepReason.OVERFLOW, nonfinite)
            self._hide()
        else:
            self._verdict = (True, StepReason.FINITE, {})
        return None

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_nested(optimizer, sys._getframe(1)):
            return
        self._show()
        if self._handed_over is not None:
            bad, names = self._handed_over
            self._handed_over = None
            del self.optimizer.found_inf, self.optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]
            self._owner.report_later(bad, names)
            return
        applied, reason, nonfinite = self._verdict
        if applied:
            self._owner.round_masters(self.parameters())
        self._owner.report(applied, reason, nonfinite)

    def _on_device(self) -> bool:
        """True where the optimizer can be told on the device to skip: fused, on CUDA, FP32 masters."""
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return fused and all(p.is_cuda for p in self.parameters()) and self._owner.defers()

    def _hand_over(self) -> None:
        """Tell a fused optimizer to skip where a gradient is not finite, without waiting for the device."""
        held = [p for p in self.parameters() if p.grad is not None]
        if not held:
            return
        norms = torch._foreach_norm([p.grad for p in held], math.inf)  # pyright: ignore
        largest = torch.stack(norms)
        bad = ~torch.isfinite(largest)
        self.optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.found_inf = bad.any().to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
        self._handed_over = (bad, [self._owner.name_of(p) for p in held])

    def _checked(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, evaluated again at a lower scale while its gradients overflow."""

        def evaluate() -> Any:
            while True:
                loss = closure()
                nonfinite = self._check()
                if not nonfinite:
                    return loss
                self._owner.report(False, StepReason.OVERFLOW, nonfinite)

        return evaluate

    def _check(self) -> dict[str, int]:
        """Non-finite values by parameter name; raises where a lower scale cannot mend them."""
        owner = self._owner
        for loss in owner.losses():
            value = loss.detach()
            if value.numel() == 1 and not math.isfinite(value.item()):
                raise NonFiniteError(
                    f"the loss itself is not finite ({value.item()}): no loss scale mends that. The step "
                    "was not applied. Look at the batch, the learning rate, or the model's output"
                )
        held = [p for p in self.parameters() if p.grad is not None]
        counts = [owner.noted(p) for p in held]
        unknown = [k for k, count in enumerate(counts) if count is None]
        found = ops.count_nonfinite([held[k].grad for k in unknown])  # pyright: ignore[reportArgumentType]
        for k, count in zip(unknown, found, strict=True):
            counts[k] = count
        nonfinite = {owner.name_of(p): n for p, n in zip(held, counts, strict=True) if n}
        if nonfinite and owner.at_floor():
            raise NonFiniteError(not_finite_at_floor(nonfinite, owner.scale()))
        return nonfinite

    def _hide(self) -> None:
        for group in self.optimizer.param_groups:
            self._hidden.append((group, group["params"]))
            group["params"] = []

    def _show(self) -> None:
        while self._hidden:
            group, parameters = self._hidden.pop()
            group["params"] = parameters


def not_finite_at_floor(nonfinite: dict[str, int], scale: float) -> str:
    """The text of the error for gradients that no lower loss scale can mend."""
    worst = ", ".join(f"{k} ({n})" for k, n in list(nonfinite.items())[:5])
    more = f" and {len(nonfinite) - 5} more" if len(nonfinite) > 5 else ""
    return (
        f"gradients are not finite at loss scale {scale:g}, which is as low as it goes: {worst}{more}. "
        "The loss is finite, so a value overflowed inside the model or its backward. "
        "The step was not applied; bf16 has FP32's range"
    )


def _is_nested(optimizer: Optimizer, step: types.FrameType) -> bool:
    """True where ``step``, the frame of torch's wrapper around step(), runs inside another of this optimizer.

    A subclass whose step calls its parent's runs the hooks twice. The stack says so with nothing to keep
    in order when a step raises.
    """
    frame = step.f_back
    while frame is not None:
        if frame.f_code is step.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False
