"""Who is told of each step: loggers, schedulers, averages; and what stops a schedule at a skipped step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch.optim import Optimizer

from halfstep.errors import OperandError
from halfstep.switching.loss_scale import StepReport

__all__ = ["LOSS_SCALE", "SKIPPED_STEPS", "Handle", "Reports", "log_to", "on_applied", "pace"]

LOSS_SCALE = "amp/loss_scale"
SKIPPED_STEPS = "amp/skipped_steps"

Callback = Callable[[StepReport], object]


class Handle:
    """What ends something: ``remove()`` does, once or often."""

    def __init__(self, end: Callable[[], object]) -> None:
        self._end: Callable[[], object] | None = end

    def remove(self) -> None:
        """No more from now on."""
        end, self._end = self._end, None
        if end is not None:
            end()


class Reports:
    """Callbacks that are called with each `StepReport`, in the order of their coming."""

    def __init__(self) -> None:
        self._callbacks: dict[object, Callback] = {}

    def subscribe(self, callback: Callback) -> Handle:
        """Have ``callback(report)`` called after each step until the handle is removed."""
        if not callable(callback):
            kind = type(callback).__name__
            raise OperandError(f"on_step takes a function of a StepReport, not a {kind}")
        key = object()
        self._callbacks[key] = callback
        return Handle(lambda: self._callbacks.pop(key, None))

    def send(self, report: StepReport) -> None:
        """Call them all; one that is removed meanwhile is not called any more."""
        for key in tuple(self._callbacks):
            if key in self._callbacks:
                self._callbacks[key](report)


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


def log_to(writer: object) -> Callback:
    """A callback that logs ``amp/loss_scale`` and ``amp/skipped_steps`` at each step.

    ``writer`` is any object with ``add_scalar(tag, value, step)``, such as tensorboard's SummaryWriter, or
    a function of a dict and a step, such as ``wandb.log``. Steps count from 1, skipped ones too.

    Raises:
        OperandError: ``writer`` is neither.

    >>> import halfstep, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> switch = halfstep.switch(model, optimizer, recipe="fp16")
    >>> handle = switch.on_step(log_to(lambda values, step: print(step, values)))
    >>> model(torch.ones(1, 4)).mean().backward()
    >>> optimizer.step()
    1 {'amp/loss_scale': 65536.0, 'amp/skipped_steps': 0}
    >>> handle.remove()
    """
    if hasattr(writer, "add_scalar"):
        board = cast(_Writer, writer)

        def scalars(report: StepReport) -> None:
            for tag, value in _values(report).items():
                board.add_scalar(tag, value, report.step)

        return scalars
    if not callable(writer):
        raise OperandError(
            f"log_to takes an object with add_scalar or a function of a dict and a step, not a "
            f"{type(writer).__name__}"
        )
    return lambda report: writer(_values(report), report.step)


def _values(report: StepReport) -> dict[str, float]:
    return {LOSS_SCALE: report.loss_scale, SKIPPED_STEPS: report.skipped_steps}


def on_applied(function: Callable[[], object]) -> Callback:
    """A callback that calls ``function()`` after each step that was applied, and after no skipped one.

    For averages of weights: ``switch.on_step(on_applied(lambda: averaged.update_parameters(model)))``.
    """

    def applied(report: StepReport) -> None:
        if report.applied:
            function()

    return applied


class _Guard(Protocol):
    optimizer: Optimizer

    def was_step_applied(self) -> bool: ...


def pace(scheduler: Any, guards: Sequence[_Guard]) -> Handle:
    """Make ``scheduler.step()`` do nothing after a skipped step of its optimizer; removal undoes it.

    The object stays what it is, its ``state_dict()`` too: it is put in a subclass of its class.

    Raises:
        OperandError: it is no scheduler of an optimizer of one of the guards.
    """
    kind = type(scheduler)
    optimizer = getattr(scheduler, "optimizer", None)
    guard = next((g for g in guards if g.optimizer is optimizer), None)
    if guard is None:
        raise OperandError(
            f"pace takes a scheduler of one of the switch's optimizers, not a {kind.__name__} of another"
        )
    applied = guard.was_step_applied

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.step(self, *args, **kwargs) if applied() else None

    paced = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
    scheduler.__class__ = paced

    def undo() -> None:
        if type(scheduler) is paced:
            scheduler.__class__ = kind

    return Handle(undo)
