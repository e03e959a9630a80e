"""What the backwards and the steps of a switch came to, and the loss scale that follows from it."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.errors import NonFiniteError
from halfstep.recipe import LossScaling
from halfstep.switching import engine
from halfstep.switching.boundary import Gate
from halfstep.switching.inspection import Finding
from halfstep.switching.loss_scale import LossScale, StepReason, StepReport
from halfstep.switching.reports import Reports

__all__ = ["Ledger", "not_finite_at_floor"]

_BACKWARDS_KEPT = 1024
_LOSSES_KEPT = 64
_SUSPICIOUS = 4
_NOT_THE_SCALES = frozenset({"weights", "data", "forward"})
"""Phases of a step in which what is not finite is none of the loss scale's doing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deferred:
    """A step whose outcome is on the device still: norm ``largest[k]`` of the gradient of ``names()[k]``."""

    largest: Tensor
    names: Callable[[], list[str]]
    losses: list[Tensor]


class Ledger:
    """The loss scale of one switch, and why it moved.

    The scale moves at most once a backward, however many optimizers step after it; one of them that
    overflowed outweighs all that did not. It never moves within a backward. An overflow lowers the scale of
    every switched model that its backward went through: the gradient may have been lost in any of them.
    """

    def __init__(self, rule: LossScaling, scaled: bool, limit: float = 65504.0) -> None:
        self.gate = Gate(1.0)
        self.gate.on_backward = self.note_backward
        self.scaled = scaled
        self.reports = Reports()
        self.locate: Callable[[], Finding] = Finding.none
        """Runs the failing step again to say where it failed: a tap."""
        self._overflows = 0
        self.steps = 0
        self.skipped_steps = 0
        self._loss_scale = self._before = LossScale.start(rule, limit)
        self._report = StepReport(
            applied=False, reason=StepReason.NONE_YET, loss_scale=1.0, nonfinite={}
        )
        # Since the last step with a verdict, or, until the next backward, up to it.
        self._tasks: deque[int] = deque(maxlen=_BACKWARDS_KEPT)
        self._losses: deque[Tensor] = deque(maxlen=_LOSSES_KEPT)
        self._judged = True
        self._finite = True
        self._largest = 0.0
        self._pending: list[tuple[bool, float]] = []
        self._deferred: list[_Deferred] = []
        self.set(self._loss_scale)
        _live.add(self)

    def close(self) -> None:
        """The switch is off: no overflow concerns it any more."""
        _live.discard(self)

    @property
    def loss_scale(self) -> LossScale:
        """The scale that the next backward will use, and its run of clean steps."""
        return self._loss_scale

    def set(self, value: LossScale) -> None:
        """Use ``value`` from now on."""
        self._loss_scale = value
        if self.scaled:
            self.gate.scale = value.scale

    # -- backwards ------------------------------------------------------------------------------------

    def note_backward(self) -> None:
        """A backward has come to the model's output; called in it, by each output."""
        task = torch._C._current_graph_task_id()
        if self._tasks and self._tasks[-1] == task:
            return
        if self._judged:
            self._tasks.clear()
            self._losses.clear()
            self._judged = self.gate.gave = False
        self._tasks.append(task)
        for root in engine.roots():
            if root.numel() == 1:
                self._losses.append(root.detach())

    def loss_error(self) -> NonFiniteError | None:
        """The error where the loss of a backward that the next step is about is inf or NaN.

        None where it is made of gradients (a penalty on their norm, an adversarial input) that the scale made
        inf: a lower one mends that.
        """
        error = _loss_error(self._losses)
        if error is None or not self.gate.gave or self.exhausted():
            return error
        finding = self.locate()
        return error if finding.phase in _NOT_THE_SCALES else None

    # -- steps ----------------------------------------------------------------------------------------

    def last_step(self) -> StepReport:
        """What became of the last step."""
        return self._report

    def exhausted(self) -> bool:
        """True where an overflow is an error: no scale that it concerns may be lowered, nor waited for."""
        return all(not it.scaled or it._loss_scale.exhausted for it in self._concerned())

    def report(
        self, applied: bool, reason: StepReason, nonfinite: dict[str, int], largest: float = 0.0
    ) -> None:
        """Note what became of a step, and move the scale; ``largest`` as in `LossScale.after`."""
        self.steps += 1
        self.skipped_steps += not applied
        self._overflows = 0 if applied else self._overflows + 1
        self._report = StepReport(
            applied=applied,
            reason=reason,
            loss_scale=self.gate.scale,
            nonfinite=nonfinite,
            step=self.steps,
            skipped_steps=self.skipped_steps,
        )
        for ledger in (self,) if applied else self._concerned():
            ledger._pending.append((applied, largest))
        self.settle_scale()
        self.reports.send(self._report)

    def check_cause(self) -> None:
        """Raise `NonFiniteError` where overflows go on and, run again, are none of the scale's doing.

        Looked at each 4th in a row: while a scale is being found, a few are expected.
        """
        if (self._overflows + 1) % _SUSPICIOUS:
            return
        finding = self.locate()
        blamed = set(_NOT_THE_SCALES)
        if self._concerned() == [
            self
        ]:  # else another model's scale may have made what came to our output
            blamed.add("loss")
        if finding.phase in blamed:
            raise NonFiniteError(
                f"gradients are not finite for {_SUSPICIOUS} steps, and the loss scale is not to blame: "
                f"{finding}. The step was not applied",
                finding,
            )

    def explained(self, error: NonFiniteError) -> NonFiniteError:
        """``error`` and where it comes from, found by running the step again."""
        if error.finding:
            return error
        finding = self.locate()
        if isinstance(error, _LossError) and finding == Finding.all_finite():
            finding = Finding.of_loss()
        return NonFiniteError(f"{error}. {finding}" if str(finding) else str(error), finding)

    def abandon(self) -> None:
        """A step was refused with an error: what is noted from now on is about new backwards."""
        self._judged = self._finite = True
        self._before = self._loss_scale

    def report_later(self, largest: Tensor, names: Callable[[], list[str]]) -> None:
        """Note a step whose outcome is on the device still; `settle` takes it in."""
        self._deferred.append(_Deferred(largest=largest, names=names, losses=list(self._losses)))

    def settle(self) -> None:
        """Take in what earlier steps left open; waits for the device where an outcome is there.

        Raises:
            NonFiniteError: an outcome that was open is one that no lower scale mends.
        """
        while self._deferred:
            step = self._deferred.pop(0)
            norms: list[float] = step.largest.tolist()
            nonfinite: dict[str, int] = {}
            if not all(map(math.isfinite, norms)):
                named = zip(step.names(), norms, strict=True)
                nonfinite = {name: 1 for name, norm in named if not math.isfinite(norm)}
            try:
                error = _loss_error(step.losses)
                if error is not None:
                    raise error
                if nonfinite and self.exhausted():
                    raise NonFiniteError(not_finite_at_floor(nonfinite, self.gate.scale))
            except NonFiniteError as error:
                self._deferred.clear()
                self.abandon()
                raise self.explained(error) from None
            reason = StepReason.OVERFLOW if nonfinite else StepReason.FINITE
            self.report(not nonfinite, reason, nonfinite, max(norms))
        self.settle_scale()

    def settle_scale(self) -> None:
        """Move the scale as pending verdicts say, unless a backward is running: it must not change in one."""
        if self._pending and torch._C._current_graph_task_id() == -1:
            finite = all(applied for applied, _ in self._pending)
            largest = max(largest for _, largest in self._pending)
            self._pending.clear()
            self._judge(finite, largest)

    def _concerned(self) -> list[Ledger]:
        """Whose scale an overflow of ours may be due to: all that our backwards went through.

        A model inside another switched one has its gradients made with the outer one's scale and no
        backwards of its own: then it is all that had any.
        """
        mine = set(self._tasks)
        having = [ledger for ledger in list(_live) if ledger._tasks]
        if mine:
            having = [ledger for ledger in having if not mine.isdisjoint(ledger._tasks)]
        return having or [self]

    def _judge(self, finite: bool, largest: float) -> None:
        """One verdict a backward: the first, or a later one that is worse."""
        if not self._judged:
            self._judged = True
            self._before = self._loss_scale
        elif not self._finite or (finite and largest <= self._largest):
            return
        self._finite, self._largest = finite, largest
        self.set(self._before.after(finite=finite, largest=largest))


_live: weakref.WeakSet[Ledger] = weakref.WeakSet()


class _LossError(NonFiniteError):
    """The loss is not finite, whatever the gradients are."""


def _loss_error(losses: Iterable[Tensor]) -> NonFiniteError | None:
    """The error for a loss that is inf or NaN."""
    for loss in losses:
        value = loss.item()
        if not math.isfinite(abs(value)):
            return _LossError(
                f"the loss itself is not finite ({value}): no loss scale mends that. The step "
                "was not applied. Look at the batch, the learning rate, or the model's output"
            )
    return None


def not_finite_at_floor(nonfinite: dict[str, int], scale: float) -> str:
    """The text of the error for gradients that no lower loss scale can mend."""
    worst = ", ".join(f"{k} ({n})" for k, n in list(nonfinite.items())[:5])
    more = f" and {len(nonfinite) - 5} more" if len(nonfinite) > 5 else ""
    return (
        f"gradients are not finite at loss scale {scale:g}, which is as low as it goes: {worst}{more}. "
        "The loss is finite, so a value overflowed inside the model or its backward. "
        "The step was not applied; bf16 has FP32's range"
    )
