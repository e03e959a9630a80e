"""Where something stopped being a number, and why: read from the evidence the step left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Breakdown", "explain_breakdown", "first_nonfinite_layer", "nonfinite_counts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """The first step at which something was not finite.

    ``step`` counts from 1; ``where`` is the kind of tensor found first on the way from the loss to
    the weights; ``names`` are those tensors with how many of their elements are not finite;
    ``reason`` is one sentence.
    """

    step: int
    where: str
    names: dict[str, int]
    elements: int
    reason: str


def nonfinite_counts(tensors: Iterable[tuple[str, Tensor | None]]) -> dict[str, int]:
    """Name to number of elements that are infinite or NaN, for those tensors that have any."""
    counts = {}
    for name, tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            bad = tensor.numel() - int(torch.isfinite(tensor.detach()).sum())
            if bad:
                counts[name] = bad
    return counts


def explain_breakdown(model: nn.Module, optimizer: Optimizer, step: int) -> Breakdown:
    """Why weights of ``model`` are not finite after ``optimizer.step()`` number ``step``.

    Looks, in the order of causes, at the gradients, at the optimizer's own state, and at the
    arithmetic of an Adam-like update in the dtype of its state.
    """
    parameters = dict(model.named_parameters())
    elements = sum(parameter.numel() for parameter in parameters.values())

    def found(where: str, names: dict[str, int], reason: str) -> Breakdown:
        return Breakdown(step=step, where=where, names=names, elements=elements, reason=reason)

    bad_gradients = nonfinite_counts((name, p.grad) for name, p in parameters.items())
    if bad_gradients:
        name = next(iter(bad_gradients))
        return found(
            "gradient",
            bad_gradients,
            f"the gradient of {name} was not finite at step {step} "
            f"({sum(bad_gradients.values())} elements in {len(bad_gradients)} tensors), "
            "and the optimizer wrote it into the weights",
        )
    bad_weights = nonfinite_counts(parameters.items())
    vanished = _divided_by_zero(parameters, optimizer)
    if vanished is not None:
        return found("update", bad_weights, vanished)
    bad_state = nonfinite_counts(
        (f"{name}.{key}", value)
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    )
    if bad_state:
        name = next(iter(bad_state))
        return found(
            "optimizer state", bad_state, f"the optimizer's {name} overflowed at step {step}"
        )
    return found(
        "update",
        bad_weights,
        f"the update of {next(iter(bad_weights), 'no weight')} was not finite at step {step} "
        "though its gradient was",
    )


def _divided_by_zero(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> str | None:
    """The sentence for Adam's m / (sqrt(v) + eps) where the denominator is 0 in the
    state's dtype.
    """
    zeros = bad = 0
    sentence = None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            second = optimizer.state.get(parameter, {}).get("exp_avg_sq")
            if second is None or "eps" not in group:
                continue
            wrong = ~torch.isfinite(parameter.detach())
            eps = torch.tensor(group["eps"]).to(second.dtype)
            if not bool(wrong.any()) or float(eps) != 0.0:
                continue
            bad += int(wrong.sum())
            zeros += int((wrong & (second == 0)).sum())
            kind = str(second.dtype).removeprefix("torch.")
            sentence = (
                f"Adam divided by zero: its eps of {group['eps']:g} is 0 in {kind}, and so is the "
                f"second moment (square of a small gradient) of the elements lost"
            )
    # A few may have been lost to NaN spreading otherwise; the cause must explain nearly all.
    return sentence if bad and zeros >= 0.99 * bad else None


def first_nonfinite_layer(model: nn.Module, forward: Callable[[], object]) -> str:
    """Name of the first module, in order of execution, whose output is not finite; "" if none.

    Calls ``forward`` once, without gradients, under hooks that are gone afterwards.
    """
    seen: list[str] = []

    def hook_for(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(
                isinstance(t, Tensor)
                and t.is_floating_point()
                and not bool(torch.isfinite(t).all())
                for t in tensors
            ):
                seen.append(name)

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if name and not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else ""
