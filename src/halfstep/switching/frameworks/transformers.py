"""Hugging Face's Trainer: a callback that switches its model, reports, and is in its checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]
from transformers.trainer_callback import ExportableState  # pyright: ignore[reportMissingImports]

from halfstep.errors import SwitchError
from halfstep.recipe import Recipe
from halfstep.switching.frameworks.accelerate import tell_skipped
from halfstep.switching.reports import LOSS_SCALE, SKIPPED_STEPS
from halfstep.switching.switch import Switch, switch

__all__ = ["HalfstepCallback"]


class HalfstepCallback(TrainerCallback, ExportableState):
    """``Trainer(callbacks=[HalfstepCallback("fp16")])``: the Trainer's model in a recipe while it trains.

    Schedules stay where they are at a skipped step. The logs have ``amp/loss_scale`` and
    ``amp/skipped_steps``. The switch's state is in ``trainer_state.json`` of each checkpoint, and
    ``train(resume_from_checkpoint=...)`` goes on from it, bit for bit.

    Raises:
        UnknownNameError: the recipe has no such name; near ones are suggested.
        SwitchError: at the start of the training: its arguments ask for ``fp16`` or ``bf16`` as well.

    Source: Transformers 5, ``TrainerCallback``, ``ExportableState``.
    """

    def __init__(self, recipe: object = "fp16") -> None:
        self.recipe = Recipe.parse(recipe)
        self.switch: Switch | None = None
        """The switch of the model in training; None before and after."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Switch the model and the optimizer; go on from the checkpoint if there is one."""
        if args.fp16 or args.bf16:
            raise SwitchError(
                f"TrainingArguments has fp16={args.fp16}, bf16={args.bf16} and HalfstepCallback was given "
                f"{self.recipe}: one of the two; leave the arguments' away"
            )
        self._off()
        prepared = kwargs["optimizer"]
        optimizer = getattr(prepared, "optimizer", prepared)
        self.switch = switch(kwargs["model"], optimizer, self.recipe)
        if prepared is not optimizer:
            tell_skipped(prepared, self.switch)
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        held = saved.get("attributes", {}).get("held", {})
        if held:
            self.switch.load_state_dict(held)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loss scale and the count of skipped steps, beside the loss."""
        if self.switch is None:
            return
        values = {LOSS_SCALE: self.switch.loss_scale, SKIPPED_STEPS: self.switch.skipped_steps}
        kwargs["logs"].update(values)
        state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model as it was, with the weights that it has learnt."""
        self._off()

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the trainer keeps of this callback."""
        held = {} if self.switch is None else self.switch.state_dict()
        return {"args": {"recipe": str(self.recipe)}, "attributes": {"held": held}}

    def _off(self) -> None:
        if self.switch is not None:
            self.switch.off()
            self.switch = None
