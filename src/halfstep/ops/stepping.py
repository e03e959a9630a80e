"""An optimizer's step in one pass over memory: gradient, weight, moments, the next working copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.errors import OperandError
from halfstep.ops.backends import Backend, choose
from halfstep.ops.counting import count_nonfinite
from halfstep.ops.custom import outside_graphs

__all__ = ["AdamNumbers", "AdamRule", "SgdNumbers", "SgdRule", "adam_step", "sgd_step"]

_GRADIENTS = (torch.float32, torch.float16, torch.bfloat16)
_COPIES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamRule:
    """What ``torch.optim.Adam`` is told; ``decoupled``: what ``torch.optim.AdamW`` does with the decay.

    ``lr`` may be a float32 tensor of one element: then 1 - lr * weight_decay and lr / (1 - beta1^t) are
    computed in float32, as torch computes them.
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SgdRule:
    """What ``torch.optim.SGD`` is told."""

    lr: float | Tensor = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamNumbers:
    """What a kernel is told: numbers of float32; ``roots`` and ``steps`` of each tensor."""

    scale: float
    maximize: bool
    penalizes: bool
    penalty: float
    decay: float
    moment: float
    rest: float
    beta2: float
    square: float
    eps: float
    roots: list[float]
    steps: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SgdNumbers:
    """What a kernel is told: numbers of float32."""

    scale: float
    maximize: bool
    penalizes: bool
    penalty: float
    fresh: bool
    nesterov: bool
    momentum: float
    gain: float
    step: float


@outside_graphs
def adam_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[float],
    rule: AdamRule,
    *,
    scale: float = 1.0,
    copies: Sequence[Tensor] = (),
    checked: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> list[int]:
    """Steps all ``weights`` in place, if every gradient is finite; gives the counts of those that are not.

    Where a count is not 0 nothing is written. Otherwise, with t the tensor's number in ``steps`` (1 at the
    first), each operation rounded to float32 but for products that are added, which round once::

        g = gradient / scale;  maximize: g = -g
        decoupled: w = w * (1 - lr * weight_decay);  else: g = g + weight_decay * w
        mean   = mean + (1 - beta1) * (g - mean)
        square = square * beta2 + ((1 - beta2) * g) * g
        w      = w + (-lr / (1 - beta1^t) * mean) / (sqrt(square) / sqrt(1 - beta2^t) + eps)
        copy   = w, rounded to nearest

    These are the bits of torch's ``AdamW(fused=True)`` and ``Adam(fused=True)`` on CPUs with AVX2 or AVX-512,
    but for the up to 15 last elements of a tensor, which torch adds in another order. Torch's Adam without
    ``fused`` has the same moments; its weights differ in the last bits, as its square root does (MKL's is not
    rounded to nearest). Moments and weights are float32, gradients float32, float16 or bfloat16, ``copies``
    (one for each weight, or none) float16 or bfloat16. Any shape, layout and device.

    ``checked``: the gradients are known to be finite, and are not read for that.

    Raises `OperandError` where lists, shapes or dtypes do not fit.

    >>> w, m, v = torch.ones(2), torch.zeros(2), torch.zeros(2)
    >>> adam_step([w], [torch.tensor([4.0, -4.0])], [m], [v], [1], AdamRule(lr=0.5), scale=4.0)
    [0]
    >>> w
    tensor([0.5000, 1.5000])

    Source: Kingma, Ba, arXiv 1412.6980; Loshchilov, Hutter, arXiv 1711.05101 (neither checked).
    """
    _check("adam_step", weights, gradients, {"means": means, "squares": squares}, copies)
    if len(steps) != len(weights):
        raise OperandError(f"adam_step: {len(weights)} weights and {len(steps)} steps")
    counts = [0] * len(weights) if checked else count_nonfinite(gradients)
    if weights and not any(counts):
        with torch.no_grad():
            everything = [*weights, *gradients, *means, *squares, *copies]
            choice = choose(
                "adam_step", weights[0].device, Backend.parse(backend), tensors=everything
            )
            numbers = _adam_numbers(rule, scale, steps)
            choice.function(weights, gradients, means, squares, copies, numbers)
    return counts


@outside_graphs
def sgd_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    rule: SgdRule,
    *,
    fresh: bool = False,
    scale: float = 1.0,
    copies: Sequence[Tensor] = (),
    checked: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> list[int]:
    """As `adam_step`, of SGD; the bits of ``torch.optim.SGD`` without ``fused``::

        g = gradient / scale;  maximize: g = -g
        g = g + weight_decay * w
        buffer = fresh: g;  else: buffer * momentum + (1 - dampening) * g
        g = nesterov: g + momentum * buffer;  else: buffer
        w = w + (-lr) * g
        copy = w, rounded to nearest

    ``fresh``: the buffers hold nothing yet. Where ``rule.momentum`` is 0 there are no buffers.

    >>> w, buffer = torch.ones(1), torch.full((1,), 2.0)
    >>> sgd_step([w], [torch.ones(1)], [buffer], SgdRule(lr=0.25, momentum=0.5))
    [0]
    >>> w, buffer
    (tensor([0.5000]), tensor([2.]))

    Source: Sutskever et al., "On the importance of initialization and momentum", ICML 2013
    (not checked).
    """
    expected = {"buffers": buffers} if rule.momentum != 0 else {}
    if buffers and not expected:
        raise OperandError(f"sgd_step: {len(buffers)} buffers and a momentum of 0; give none")
    _check("sgd_step", weights, gradients, expected, copies)
    counts = [0] * len(weights) if checked else count_nonfinite(gradients)
    if weights and not any(counts):
        with torch.no_grad():
            everything = [*weights, *gradients, *buffers, *copies]
            choice = choose(
                "sgd_step", weights[0].device, Backend.parse(backend), tensors=everything
            )
            choice.function(weights, gradients, buffers, copies, _sgd_numbers(rule, scale, fresh))
    return counts


def _check(
    op: str,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    copies: Sequence[Tensor],
) -> None:
    lists = {"gradients": gradients, **states, **({"copies": copies} if copies else {})}
    for name, given in lists.items():
        if len(given) != len(weights):
            raise OperandError(f"{op}: {len(weights)} weights and {len(given)} {name}")
    allowed = {"gradients": _GRADIENTS, "copies": _COPIES}
    for name, given in {"weights": weights, **lists}.items():
        dtypes = allowed.get(name, (torch.float32,))
        for index, (tensor, weight) in enumerate(zip(given, weights, strict=True)):
            if tensor.shape != weight.shape:
                raise OperandError(
                    f"{op}: {name}[{index}] is of shape {tuple(tensor.shape)}, its weight of "
                    f"{tuple(weight.shape)}"
                )
            if tensor.dtype not in dtypes:
                raise OperandError(
                    f"{op}: {name}[{index}] is {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}"
                )


def _adam_numbers(rule: AdamRule, scale: float, steps: Sequence[float]) -> AdamNumbers:
    beta1, beta2 = rule.betas
    # in Python's numbers, or in those of a tensor, as torch computes them
    corrections = {
        t: (_single(math.sqrt(1 - beta2**t)), _single(-(rule.lr / (1 - beta1**t))))
        for t in {*steps}
    }
    moment = _single(1 - beta1)
    decays = rule.decoupled and rule.weight_decay != 0
    return AdamNumbers(
        scale=_single(scale),
        maximize=rule.maximize,
        penalizes=rule.weight_decay != 0 and not rule.decoupled,
        penalty=_single(rule.weight_decay),
        decay=_single(1 - rule.lr * rule.weight_decay) if decays else 1.0,
        moment=moment,
        rest=_single(moment - 1),
        beta2=_single(beta2),
        square=_single(1 - beta2),
        eps=_single(rule.eps),
        roots=[corrections[t][0] for t in steps],
        steps=[corrections[t][1] for t in steps],
    )


def _sgd_numbers(rule: SgdRule, scale: float, fresh: bool) -> SgdNumbers:
    return SgdNumbers(
        scale=_single(scale),
        maximize=rule.maximize,
        penalizes=rule.weight_decay != 0,
        penalty=_single(rule.weight_decay),
        fresh=fresh,
        nesterov=rule.nesterov,
        momentum=_single(rule.momentum),
        gain=_single(1 - rule.dampening),
        step=_single(-rule.lr),
    )


def _single(number: float | Tensor) -> float:
    """The float32 nearest to ``number``."""
    return torch.tensor(float(number), dtype=torch.float32).item()
