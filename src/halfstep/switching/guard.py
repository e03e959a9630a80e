"""The optimizer's side: gradients that are not finite never reach it, 16-bit masters are rounded after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from halfstep import ops
from halfstep.errors import NonFiniteError
from halfstep.switching.loss_scale import StepReason

__all__ = ["Guard", "Owner"]


class Owner(Protocol):
    """What a guard asks of its switch."""

    def name_of(self, parameter: Tensor) -> str:
        """The parameter's name in the model."""
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
        self._depth = 0
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
        if self._depth and self._hidden:  # an earlier step that was skipped raised on its way
            self._show()
            self._depth = 0
        self._depth += 1
        if self._depth > 1:  # a subclass whose step calls its parent's: one step
            return None
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
        try:
            nonfinite = self._check()
        except BaseException:
            self._depth = 0
            raise
        if nonfinite:
            self._verdict = (False, StepReason.OVERFLOW, nonfinite)
            self._hide()
        else:
            self._verdict = (True, StepReason.FINITE, {})
        return None

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._show()
        applied, reason, nonfinite = self._verdict
        if applied:
            self._owner.round_masters(self.parameters())
        self._owner.report(applied, reason, nonfinite)

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
        counts = ops.count_nonfinite([p.grad for p in held])  # pyright: ignore[reportArgumentType]
        nonfinite = {owner.name_of(p): n for p, n in zip(held, counts, strict=True) if n}
        if nonfinite and owner.at_floor():
            worst = ", ".join(f"{k} ({n})" for k, n in list(nonfinite.items())[:5])
            more = f" and {len(nonfinite) - 5} more" if len(nonfinite) > 5 else ""
            raise NonFiniteError(
                f"gradients are not finite at loss scale {owner.scale():g}, which is as low as it goes: "
                f"{worst}{more}. The loss is finite, so a value overflowed inside the model or its backward. "
                "The step was not applied; bf16 has FP32's range"
            )
        return nonfinite

    def _hide(self) -> None:
        for group in self.optimizer.param_groups:
            self._hidden.append((group, group["params"]))
            group["params"] = []

    def _show(self) -> None:
        while self._hidden:
            group, parameters = self._hidden.pop()
            group["params"] = parameters
