"""Lightning: a precision plugin that switches the module which the trainer trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch.plugins import Precision  # pyright: ignore[reportMissingImports]

from halfstep.recipe import Recipe
from halfstep.switching.switch import Switch, switch

__all__ = ["HalfstepPrecision"]


class HalfstepPrecision(Precision):
    """``Trainer(plugins=[HalfstepPrecision("fp16")])``: a recipe as Lightning's precision.

    The module is switched when the trainer sets it up and switched off when it is done. Gradients are true
    ones at all times, so that clipping and the module's hooks are as in FP32. Schedulers with
    ``interval="step"`` stay where they are at a skipped step, the state is in the trainer's checkpoints.
    Optimizers that cannot step without a closure (LBFGS) are run with it.

    Raises:
        UnknownNameError: the recipe has no such name; near ones are suggested.

    Source: Lightning 2.6, ``lightning.pytorch.plugins.Precision``.
    """

    def __init__(self, recipe: object = "fp16") -> None:
        super().__init__()
        self.recipe = Recipe.parse(recipe)
        self.switch: Switch | None = None
        """The switch of the module in training; None before and after."""

    def connect(self, model: Any, optimizers: list[Any], lr_schedulers: list[Any]) -> Any:
        """Switch what the trainer has set up."""
        self.teardown()
        self.switch = switch(model, optimizers or None, self.recipe)
        for config in lr_schedulers:
            if config.interval == "step" and not config.reduce_on_plateau:
                self.switch.pace(config.scheduler)
        return super().connect(model, optimizers, lr_schedulers)

    def optimizer_step(
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """The step after its gradients, so that one that overflows is skipped and not tried again."""
        if _needs_closure(optimizer):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        result = closure()
        self._after_closure(model, optimizer)
        if result is None and model.automatic_optimization:
            return None  # training_step skipped its batch: there is no gradient to step by
        optimizer.step(**kwargs)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The switch's, for the trainer's checkpoints."""
        return {} if self.switch is None else self.switch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the trainer's checkpoint."""
        if self.switch is not None and state_dict:
            self.switch.load_state_dict(state_dict)

    def teardown(self) -> None:
        """The module as it was, with the weights that it has learnt."""
        if self.switch is not None:
            self.switch.off()
            self.switch = None


def _needs_closure(optimizer: Any) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
