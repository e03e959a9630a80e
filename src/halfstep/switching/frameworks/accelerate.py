"""Accelerate: its schedulers see which steps were skipped, its checkpoints hold the switch's state."""

from __future__ import annotations

from typing import Any

from halfstep.errors import OperandError, SwitchError
from halfstep.switching.switch import Switch

__all__ = ["follow", "tell_skipped"]


def follow(accelerator: Any, switch: Switch) -> None:
    """Have ``accelerator`` take part in ``switch``: once, after ``accelerator.prepare``.

    ``optimizer.step_was_skipped`` and ``accelerator.optimizer_step_was_skipped`` say what became of the step,
    so that prepared schedulers stay where they are; ``save_state`` and ``load_state`` include the switch.
    The model and the optimizer are switched before they are prepared.

    Raises:
        SwitchError: the accelerator has a mixed precision of its own, or no optimizer that the switch has.

    Source: Accelerate 1.15, ``AcceleratedOptimizer.step_was_skipped``, ``register_for_checkpointing``.
    """
    if accelerator.mixed_precision != "no":
        raise SwitchError(
            f"the accelerator has mixed_precision={accelerator.mixed_precision!r} and the model is switched "
            f'to {switch.recipe}: one of the two; say Accelerator(mixed_precision="no")'
        )
    own = [o for o in accelerator._optimizers if getattr(o, "optimizer", o) in switch.optimizers]
    if not own:
        raise SwitchError(
            "none of the accelerator's optimizers is the switch's: call halfstep.switch(model, optimizer) "
            "first, then accelerator.prepare, then follow"
        )
    for prepared in own:
        tell_skipped(prepared, switch)
    accelerator.register_for_checkpointing(switch)


def tell_skipped(prepared: Any, switch: Switch) -> None:
    """Make ``step_was_skipped`` of a prepared optimizer the switch's word; the object stays what it is.

    Raises:
        OperandError: it is no optimizer that Accelerate has prepared.
    """
    kind = type(prepared)
    if not hasattr(kind, "step_was_skipped"):
        raise OperandError(
            f"tell_skipped takes an optimizer that Accelerate has prepared, not a {kind.__name__}"
        )
    skipped = property(lambda self: not switch.was_step_applied(self.optimizer))
    body = {"step_was_skipped": skipped, "__module__": kind.__module__}
    prepared.__class__ = type(kind.__name__, (kind,), body)
