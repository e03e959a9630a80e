"""The user's own optimizer, its arithmetic in one pass over memory: torch.optim.SGD, Adam and AdamW on CPUs.

Everything about the optimizer stays torch's: its step, hooks, state, parameter groups. Only what it gathers
of a group is taken out of its hands where `halfstep.ops.adam_step` or `sgd_step` can do it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode

from halfstep import ops
from halfstep.ops import native
from halfstep.ops.layout import lie_alike

__all__ = ["step_in_one_pass"]


def step_in_one_pass(optimizer: Optimizer) -> Callable[[], None]:
    """Have ``optimizer`` step in one pass from now on, if it is one of torch's three; returns the way back.

    Left to torch are: subclasses, ``fused=True`` (which is one pass already), ``amsgrad``, ``capturable``,
    ``differentiable``, hyperparameters that are tensors (but SGD's learning rate), parameters that are not
    float32 on the CPU or whose gradient and state lie in memory in another order, and steps that a dispatch
    mode looks on or a compiler traces.

    SGD has torch's bits. Of Adam the moments do; a weight may differ in the last bits, as torch's square root
    there is not rounded to nearest.
    """
    gather = {SGD: _sgd, Adam: _adam, AdamW: _adam}.get(type(optimizer))
    if gather is None or native.MISSING:
        return _nothing
    torchs = optimizer._init_group  # pyright: ignore[reportAttributeAccessIssue]

    def init_group(group: dict[str, Any], *lists: list[Any]) -> bool:
        special: bool = torchs(group, *lists)
        if _takes(optimizer, group):
            gather(optimizer, group, lists)
        return special

    optimizer._init_group = init_group  # pyright: ignore[reportAttributeAccessIssue]

    def undo() -> None:
        if optimizer.__dict__.get("_init_group") is init_group:
            del optimizer._init_group  # pyright: ignore[reportAttributeAccessIssue]

    return undo


def _nothing() -> None:
    return None


_NOT_OURS = ("fused", "amsgrad", "capturable", "differentiable")


def _takes(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    if any(group.get(option) for option in _NOT_OURS) or hasattr(optimizer, "found_inf"):
        return False
    lr = group["lr"]
    if isinstance(lr, Tensor) and (
        type(optimizer) is not SGD or lr.requires_grad or lr.numel() != 1
    ):
        return False  # with a tensor Adam computes its step's length in float32
    others = {**group, "lr": 0, "params": ()}
    numbers = [x for v in others.values() for x in (v if isinstance(v, tuple) else (v,))]
    return not any(isinstance(number, Tensor) for number in numbers)


def _adam(optimizer: Optimizer, group: dict[str, Any], lists: tuple[list[Any], ...]) -> None:
    parameters, gradients, means, squares, _, counts = lists
    ours, others = _split(parameters, gradients, means, squares)
    if not ours:
        return
    torch._foreach_add_([counts[i] for i in ours], 1)  # pyright: ignore[reportPrivateImportUsage]
    rule = ops.AdamRule(
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=type(optimizer) is AdamW or bool(group.get("decoupled_weight_decay")),
        maximize=group["maximize"],
    )
    ops.adam_step(
        *([one[i] for i in ours] for one in (parameters, gradients, means, squares)),  # pyright: ignore
        steps=[counts[i].item() for i in ours],
        rule=rule,
        checked=True,
    )
    _keep(others, lists)


def _sgd(optimizer: Optimizer, group: dict[str, Any], lists: tuple[list[Any], ...]) -> None:
    parameters, gradients, buffers = lists
    rule = ops.SgdRule(
        lr=group["lr"],
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )
    has_buffers = rule.momentum != 0
    given = (
        [b if b is not None else g for b, g in zip(buffers, gradients, strict=True)]
        if has_buffers
        else gradients
    )
    ours, others = _split(parameters, gradients, given)
    for fresh in (False, True):
        now = [i for i in ours if (has_buffers and buffers[i] is None) is fresh]
        if not now:
            continue
        if fresh:
            for i in now:
                buffers[i] = torch.empty_like(gradients[i])
                optimizer.state[parameters[i]]["momentum_buffer"] = buffers[i]
        ops.sgd_step(
            [parameters[i] for i in now],
            [gradients[i] for i in now],
            [buffers[i] for i in now] if has_buffers else [],
            rule,
            fresh=fresh,
            checked=True,
        )
    _keep(others, lists)


def _split(*lists: list[Tensor]) -> tuple[list[int], list[int]]:
    """The places of parameters that are stepped here, and of those that torch steps."""
    ours: list[int] = []
    others: list[int] = []
    for index, tensors in enumerate(zip(*lists, strict=True)):
        on_cpu = tensors[0].device.type == "cpu"  # elsewhere torch's own fused kernels serve
        fits = on_cpu and all(t.dtype == torch.float32 for t in tensors) and lie_alike(tensors)
        (ours if fits else others).append(index)
    return ours, others


def _keep(places: list[int], lists: tuple[list[Any], ...]) -> None:
    """Leave torch what is at ``places``; a list that torch has not filled stays empty."""
    for one in lists:
        one[:] = [one[i] for i in places] if one else []
