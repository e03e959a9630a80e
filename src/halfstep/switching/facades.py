"""``halfstep.GradScaler`` and ``halfstep.autocast``: torch.amp's signatures, for loops already written.

A loop that calls a scaler by hand keeps doing so; what it calls has a floor, knows why a gradient is not
finite, looks again before the step, and says what became of it. Where nothing is written yet,
``halfstep.switch`` does all of it with nothing to call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from halfstep import ops
from halfstep.errors import NonFiniteError, OperandError, SwitchError
from halfstep.recipe import Recipe
from halfstep.switching import engine, overrides, unlisted
from halfstep.switching.ledger import not_finite_at_floor
from halfstep.switching.loss_scale import StepReason, StepReport
from halfstep.switching.met import Met
from halfstep.switching.naming import place_of
from halfstep.switching.plan import make_plan
from halfstep.switching.region import Region, current, loose_region

__all__ = ["GradScaler", "autocast", "take_away"]


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that cannot collapse, and says what became of each step.

    Signature, state and return values are torch's; ``enabled=False`` makes every call a no-op. What differs:

    - The scale never falls below ``min_loss_scale``: gradients that are not finite there raise, as does a
      loss that is not finite. torch goes on to a scale of 0 and writes NaN into the weights.
    - Gradients are looked at again in ``step``: what went bad after ``unscale_`` raises too, instead of
      reaching the weights.
    - ``last_step`` is the `StepReport` of the last ``step(optimizer)``.

    In each case the step is not applied and the scale is not lowered.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in torch.
        min_loss_scale: the floor, above 0 and at most ``init_scale``.

    Raises:
        OperandError: ``min_loss_scale`` is not between 0 and ``init_scale``.
        NonFiniteError: from ``step``, as above.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> scaler = GradScaler("cpu", init_scale=8.0)
    >>> scaler.scale(weight.sum()).backward()
    >>> scaler.step(optimizer)
    >>> scaler.update()
    >>> scaler.last_step.applied, weight.tolist()
    (True, [0.5, 0.5])
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_loss_scale: float = 1.0,
    ) -> None:
        if not 0 < min_loss_scale <= init_scale < math.inf:
            raise OperandError(
                f"min_loss_scale={min_loss_scale} must be above 0 and at most init_scale={init_scale}"
            )
        super().__init__(
            device, init_scale, growth_factor, backoff_factor, growth_interval, enabled
        )
        self._floor = min_loss_scale
        self._losses: list[Tensor] = []
        self._steps = self._skipped = 0
        self._refused = False
        self.last_step = StepReport(
            applied=False, reason=StepReason.NONE_YET, loss_scale=init_scale, nonfinite={}
        )

    def scale(self, outputs: Any) -> Any:
        """``outputs`` times the scale: a tensor, or an iterable of tensors and of iterables."""
        if self._enabled:
            given = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            self._losses += [t.detach() for t in given if isinstance(t, Tensor) and t.numel() == 1]
        return super().scale(outputs)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """``optimizer.step(*args, **kwargs)`` where all gradients are finite; its return value, else None.

        Raises:
            NonFiniteError: they are not, and a lower scale cannot mend it.
        """
        if not self._enabled:
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        changed = False
        if state["stage"] is OptState.UNSCALED:
            before = state["found_inf_per_device"]
            after = self._check_inf_per_device(optimizer)
            changed = bool(_any(after)) and not _any(before)
            for device, found in before.items():
                after[device] = torch.maximum(after.get(device, found), found)
        returned = super().step(optimizer, *args, **kwargs)
        self._judge(optimizer, bool(_any(state["found_inf_per_device"])), changed)
        return returned

    def _judge(self, optimizer: Optimizer, found: bool, changed: bool) -> None:
        """Report the step, or raise where the scale is not to blame."""
        scale = self.get_scale()
        nonfinite = _nonfinite(optimizer) if found else {}
        self._steps += 1
        self._skipped += found
        self.last_step = StepReport(
            applied=not found,
            reason=StepReason.OVERFLOW if found else StepReason.FINITE,
            loss_scale=scale,
            nonfinite=nonfinite,
            step=self._steps,
            skipped_steps=self._skipped,
        )
        if not found:
            return
        lost = next(
            (v for v in (t.item() for t in self._losses) if not math.isfinite(abs(v))), None
        )
        if lost is None and not changed and scale > self._floor:
            return
        self._losses.clear()
        self._per_optimizer_states.pop(id(optimizer))
        self._refused = True
        if lost is not None:
            raise NonFiniteError(
                f"the loss itself is not finite ({lost}): no loss scale mends that. The step was not "
                "applied. Look at the batch, the learning rate, or the model's output"
            )
        if changed:
            raise NonFiniteError(
                f"gradients were finite when they were unscaled and are not at the step: "
                f"{', '.join(nonfinite)}. Something between scaler.unscale_() and scaler.step() changed "
                "them. The step was not applied"
            )
        raise NonFiniteError(not_finite_at_floor(nonfinite, scale))

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Lower or raise the scale as the steps since the last update say; set it to ``new_scale``, if given.

        Without a step that could be judged it stays, as after a step that raised.
        """
        self._losses.clear()
        if not self._enabled:
            return
        judged = any(s["found_inf_per_device"] for s in self._per_optimizer_states.values())
        refused, self._refused = self._refused, False
        if new_scale is None and refused and not judged:
            self._per_optimizer_states.clear()
            return
        super().update(new_scale)
        if self._scale is not None:
            self._scale.clamp_(min=self._floor)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict()`` of this class, of torch's, or of a switch; what it lacks stays.

        Raises:
            RuntimeError: it is empty, as torch's.
            SwitchError: its scale is 0, negative or not finite.
        """
        if not self._enabled:
            return
        if not state_dict:
            super().load_state_dict({})
        mine = self.state_dict()
        state = {key: state_dict.get(key, value) for key, value in mine.items()}
        scale = float(state["scale"])
        if not 0 < scale < math.inf:
            raise SwitchError(
                f"scale={scale} in the state is not finite and above 0: the run that saved it could not go "
                "on. Leave the state out to start afresh"
            )
        super().load_state_dict({**state, "scale": max(scale, self._floor)})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_losses": []}


def _any(found: Mapping[Any, Tensor]) -> float:
    return sum(float(t) for t in found.values())


def _nonfinite(optimizer: Optimizer) -> dict[str, int]:
    """How many values of each gradient are not finite, by the parameter's place."""
    held = [
        (place_of(optimizer, g, k), p.grad)
        for g, group in enumerate(optimizer.param_groups)
        for k, p in enumerate(group["params"])
        if p.grad is not None
    ]
    counts = ops.count_nonfinite([g._values() if g.is_sparse else g for _, g in held])
    return {place: n for (place, _), n in zip(held, counts, strict=True) if n}


class autocast(torch.autocast):  # noqa: N801 - torch's name
    """``torch.autocast`` with one meaning on every device: the op policy of the recipe of that dtype.

    On CPUs torch leaves 34 operations in 16 bits that its CUDA autocast computes in FP32 (softmax, exp, sum,
    layer_norm ...), and float16 has no fast kernels. Here both devices follow halfstep's policy ``amp``, and
    float16 on a CPU is emulated with exact products and FP32 sums. Arguments, nesting, use as a decorator and
    ``enabled=False`` are torch's. Inside a switched model it is torch's autocast in the recipe's dtype.

    The policy's kernels are installed at the first use and stay: outside of an autocast region they do what
    torch's own would.

    >>> import torch
    >>> with autocast("cpu", dtype=torch.float16):
    ...     product = torch.ones(2, 2) @ torch.ones(2, 2)
    ...     product.dtype, torch.softmax(product, 0).dtype
    (torch.float16, torch.float32)
    """

    def __init__(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        super().__init__(device_type, dtype, enabled, cache_enabled)
        self._opened: list[ExitStack] = []

    def __enter__(self) -> Any:
        opened = ExitStack()
        entered = super().__enter__()
        outer = current()
        recipe = _RECIPES.get(self.fast_dtype or torch.float32)
        if self._enabled and recipe is not None and (outer is None or outer.loose):
            opened.enter_context(_region(self.device, recipe).opened())
        self._opened.append(opened)
        return entered

    def __exit__(self, *raised: Any) -> Any:
        self._opened.pop().close()
        return super().__exit__(*raised)


_RECIPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_met = Met()
_kept: dict[tuple[str, str], list[Callable[[], None]]] = {}


def _region(device: str, recipe: str) -> Region:
    """An open-ended region: the kernels that it needs stay until `take_away`."""
    plan = make_plan(Recipe.parse(recipe), device)
    if (device, recipe) not in _kept:
        _kept[device, recipe] = [
            overrides.install(plan),
            unlisted.install(plan),
            engine.install(_checkpoints.before),
        ]
    return loose_region(plan, _met)


def take_away() -> None:
    """Take away the kernels that `autocast` has left installed; call it outside of any."""
    while _kept:
        for remove in _kept.popitem()[1]:
            remove()


class _Checkpoints:
    """What checkpointing asks of a region; there is nothing to check in one that scales nothing."""

    def before(self, roots: tuple[Tensor, ...], wanted: tuple[Any, ...]) -> None:
        """Before a backward."""


_checkpoints = _Checkpoints()
