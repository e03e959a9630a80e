"""A failing step run once more, looked at operation by operation: where something stopped being a number.

While all is well only references are kept: what each forward of a step was given, and the gradients that came
back to its outputs, with the state of the random numbers. `locate` runs them again when a step has failed.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfstep.recipe import Recipe
from halfstep.switching import engine, overrides
from halfstep.switching.boundary import OUTWARD, Gate, leave
from halfstep.switching.inspection import Finding, Inspection, first_bad_row, is_finite
from halfstep.switching.met import Met
from halfstep.switching.plan import Plan, make_plan
from halfstep.switching.region import SINGLES, Region
from halfstep.switching.roles import Roles
from halfstep.switching.structure import map_tensors, tensors_in

__all__ = ["Recorder", "locate", "locator"]

# What may be kept alive besides the latest forward's, in bytes and in number.
_BYTES = 64 << 20
_CALLS = 64
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(slots=True, kw_only=True, weakref_slot=True, eq=False)
class _Call:
    """One outermost forward: how to run it again, and the gradients that came to its outputs."""

    module: nn.Module
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: list[Tensor]
    step: int
    grads: dict[int, Tensor] = field(default_factory=dict)
    bytes: int = 0
    """What is kept alive: gradients, and its inputs once another forward came after it."""


class Recorder:
    """The forwards since the last step, by reference."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def note(
        self, module: nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], step: int
    ) -> _Call:
        """Remember a forward of the step that comes after ``step`` others; earlier steps' are dropped."""
        calls = self._calls
        if calls and calls[-1].step != step:
            calls.clear()
        random = [torch.default_generator.get_state()]
        given = _flat(args, kwargs)
        if given and given[0].is_cuda:
            random.append(torch.cuda.get_rng_state(given[0].device))
        noted = _Call(module=module, call=call, args=args, kwargs=kwargs, random=random, step=step)
        if calls:
            calls[-1].bytes += sum(t.nbytes for t in _flat(calls[-1].args, calls[-1].kwargs))
        calls.append(noted)
        self._trim()
        return noted

    def await_gradients(
        self, noted: _Call, outputs: Any, on_backward: Callable[[], None] | None
    ) -> None:
        """Have the gradients that come to ``outputs`` remembered too.

        ``on_backward`` is called when one comes, but for outputs whose own boundary tells of it: one hook
        costs less than two.
        """
        weak = weakref.ref(noted)
        for k, out in enumerate(_flat((outputs,), {})):
            node = out.grad_fn
            if node is not None:
                tell = None if isinstance(node, OUTWARD) else on_backward
                node.register_prehook(functools.partial(self._arrived, weak, k, tell))

    def _arrived(
        self,
        weak: weakref.ref[_Call],
        k: int,
        on_backward: Callable[[], None] | None,
        grads: tuple[Tensor | None, ...],
    ) -> None:
        if on_backward is not None:
            on_backward()
        noted, grad = weak(), grads[0]
        if noted is None or grad is None or k in noted.grads:
            return
        size = grad.nbytes
        if noted.bytes + size > _BYTES:
            return
        noted.grads[k] = grad.detach()
        noted.bytes += size
        self._trim()

    def _trim(self) -> None:
        calls = self._calls
        if len(calls) < 2:
            return
        size = sum(call.bytes for call in calls[:-1])
        while len(calls) > 1 and (size > _BYTES or len(calls) > _CALLS):
            size -= calls.pop(0).bytes

    def calls(self) -> list[_Call]:
        """Those remembered, in order."""
        return list(self._calls)

    def clear(self) -> None:
        """Forget them."""
        self._calls.clear()


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Tensor]:
    """`tensors_in` of both, at once where there are only tensors: this is on the way of every forward."""
    if not kwargs and all(type(a) is Tensor for a in args):
        return args
    return tensors_in((args, kwargs))


class Run(Protocol):
    """What is asked of a switch."""

    model: nn.Module
    plan: Plan
    recorder: Recorder
    roles: Roles
    ledger: Any


def locator(of: weakref.ref[Any]) -> Callable[[], Finding]:
    """`locate` for a switch that is not kept alive."""

    def found() -> Finding:
        run = of()
        return Finding.none() if run is None else locate(run)

    return found


def locate(run: Run) -> Finding:
    """Where the first value of the remembered forwards and their backwards stopped being finite.

    Runs each again in the recipe, and the failing one in FP32 and at smaller scales too. Weights, gradients,
    buffers and random numbers are as they were afterwards. What a forward does besides (a counter, a print)
    it does again.
    """
    model, scale = run.model, run.ledger.gate.scale
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            return Finding(
                phase="weights",
                module=name.rpartition(".")[0],
                operation="",
                operand=name,
                detail="the parameter itself is not finite: an earlier step wrote it",
            )
    calls = run.recorder.calls()
    # On several ranks forward may wait for the others, who do not run theirs again.
    if not calls or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Finding.none()
    try:
        with _as_it_was(model):
            for k, call in enumerate(calls):
                found = _examine(call, run, scale)
                if found is not None:
                    return found.of_batch(k, len(calls))
    except (
        Exception
    ) as error:  # the user's forward, run at a time of ours: what it raises is not to hide
        return Finding.nothing(f"the step could not be run again: {error!r}")
    if not all(call.grads for call in calls):
        return Finding.nothing(
            "run again, the forward is finite; gradients of the outputs were too large to be kept, so the "
            "backward was not run again"
        )
    return Finding.all_finite()


def _examine(call: _Call, run: Run, scale: float) -> Finding | None:
    plan = run.plan
    for k, t in enumerate(tensors_in((call.args, call.kwargs))):
        if not is_finite(t):
            return Finding(
                phase="data",
                module="",
                operation="",
                operand=f"input {k}",
                index=first_bad_row(t, t.size(0) if t.dim() else 0),
                detail="what forward was given is not finite: no format and no scale mends that",
            )
    found, _ = _run(call, run, plan, scale, inspect=True)
    if found is None:
        for k, grad in call.grads.items():
            if not is_finite(grad):
                return Finding(
                    phase="loss",
                    module="",
                    operation="",
                    operand=f"gradient of output {k}",
                    index=first_bad_row(grad, grad.size(0) if grad.dim() else 0),
                    detail="the model's outputs are finite, and the gradient that the loss function gave "
                    "for them is not",
                )
        return None
    remedies = {}
    for name, other, at in (
        ("fp32", make_plan(Recipe.parse("fp32"), plan.device), 1.0),
        ("bf16", make_plan(Recipe.parse("bf16"), plan.device), 1.0),
        (f"a loss scale of {scale * 2.0**-10:g}", plan, scale * 2.0**-10),
    ):
        if str(plan.recipe) == name:
            continue
        uninstall = overrides.install(other)
        try:
            remedies[name] = _run(call, run, other, at, inspect=False)[1]
        finally:
            uninstall()
    return found.with_remedies(remedies)


def _run(
    call: _Call, run: Run, plan: Plan, scale: float, *, inspect: bool
) -> tuple[Finding | None, bool]:
    """One forward and backward; what the inspection found, and whether all that came out is finite."""
    model = run.model
    roles = run.roles if plan is run.plan else Roles(plan, model)
    region = Region(plan, Gate(scale), True, SINGLES, _unchecked, roles, Met())
    # As `Switch.run` has it: inputs are rounded where every tensor of the region is.
    narrow = plan.active and (plan.narrow_writes or not plan.wide_operations)

    def given(t: Tensor) -> Tensor:
        t = t.detach()
        if narrow and t.dtype == torch.float32:
            t = t.to(plan.low)
        return t

    args, kwargs = map_tensors((call.args, call.kwargs), given)
    torch.set_rng_state(call.random[0])
    if len(call.random) > 1:
        torch.cuda.set_rng_state(call.random[1])
    batch = next((t.size(0) for t in tensors_in((args, kwargs)) if t.dim()), 0)
    inspection = Inspection(model, batch) if inspect else contextlib.nullcontext()
    with torch.enable_grad(), inspection as seen:
        with contextlib.ExitStack() as opened:
            opened.callback(region.clear)
            opened.enter_context(region.opened())
            opened.enter_context(overrides.autocast(plan))
            outputs = tensors_in(call.call(*args, **kwargs))
        if seen is not None and seen.counts(outputs) is not None:
            return seen.finding, False
        left = [_outside(t, region) for t in outputs]
        finite = all(is_finite(t) for t in left)
        pairs = [(left[k], g) for k, g in call.grads.items() if left[k].requires_grad]
        if not pairs or not all(is_finite(g) for _, g in pairs):
            return None, finite
        if seen is not None:
            seen.backward()
        wanted = [p for p in model.parameters() if p.requires_grad]
        with engine.unnoticed():
            grads = torch.autograd.grad(
                [t for t, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
            )
    made = [g for g in grads if g is not None]
    finite = finite and all(is_finite(g) for g in made)
    return (seen.counts(made) if seen is not None else None), finite


def _outside(t: Tensor, region: Region) -> Tensor:
    dtype = torch.float32 if t.dtype in _NARROW else t.dtype
    return leave(t, region.gate, dtype) if t.grad_fn is not None else t.to(dtype)


def _unchecked(out: Any, region: Region, given: Any) -> bool:
    """Nothing that a replay makes is kept."""
    return False


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Buffers and random numbers are put back at the end."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = list({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
