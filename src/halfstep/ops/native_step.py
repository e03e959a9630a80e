"""Optimizer steps on CPUs: thin calls into ``halfstep._core``. Equal to the reference bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfstep.ops import step_reference
from halfstep.ops.layout import lie_alike
from halfstep.ops.native import CARRIERS, MISSING, core
from halfstep.ops.step_reference import written

if TYPE_CHECKING:
    from halfstep.ops.stepping import AdamNumbers, SgdNumbers

__all__ = ["adam", "refuses_step", "sgd", "touch"]


def refuses_step(asked: object, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot take any such tensors; empty if they can."""
    return MISSING


def adam(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: AdamNumbers,
) -> None:
    """One step of Adam or AdamW in place; see `halfstep.ops.adam_step`."""
    ours, others = _ours([weights, means, squares, copies], gradients)
    rule = core().AdamRule(
        scale=numbers.scale,
        maximize=numbers.maximize,
        penalizes=numbers.penalizes,
        penalty=numbers.penalty,
        decay=numbers.decay,
        moment=numbers.moment,
        beta2=numbers.beta2,
        square=numbers.square,
        eps=numbers.eps,
    )
    core().adam(
        rule=rule,
        **_arrays(ours, weights, gradients, means, copies),
        squares=_addresses(ours, squares),
        roots=[numbers.roots[i] for i in ours],
        steps=[numbers.steps[i] for i in ours],
        threads=torch.get_num_threads(),
    )
    written(ours, weights, means, squares, copies)
    step_reference.adam_at(others, weights, gradients, means, squares, copies, numbers)


def sgd(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: SgdNumbers,
) -> None:
    """One step of SGD in place; see `halfstep.ops.sgd_step`."""
    ours, others = _ours([weights, means, copies], gradients)
    rule = core().SgdRule(
        scale=numbers.scale,
        maximize=numbers.maximize,
        penalizes=numbers.penalizes,
        penalty=numbers.penalty,
        fresh=numbers.fresh,
        nesterov=numbers.nesterov,
        momentum=numbers.momentum,
        gain=numbers.gain,
        step=numbers.step,
    )
    core().sgd(
        rule=rule,
        **_arrays(ours, weights, gradients, means, copies),
        threads=torch.get_num_threads(),
    )
    written(ours, weights, means, copies)
    step_reference.sgd_at(others, weights, gradients, means, copies, numbers)


def touch(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor],
) -> None:
    """Reads and writes what a step does with one addition each: what memory allows, for benchmarks.

    Contiguous float32 tensors on the CPU, 16-bit copies; ``squares`` may be none.
    """
    ours = range(len(weights))
    core().touch(
        weights=_addresses(ours, weights),
        gradients=_addresses(ours, gradients),
        means=_addresses(ours, means),
        squares=_addresses(ours, squares),
        copies=_addresses(ours, copies),
        sizes=[w.numel() for w in weights],
        threads=torch.get_num_threads(),
    )
    written(ours, weights, means, squares, copies)


def _ours(
    states: Sequence[Sequence[Tensor]], gradients: Sequence[Tensor]
) -> tuple[list[int], list[int]]:
    """The places of tensors that the kernels take, and of the others.

    None are where some share memory: one after another, as torch does it, is not all at once.
    """
    lists = [one for one in states if one]
    ours: list[int] = []
    others: list[int] = []
    for index, group in enumerate(zip(*lists, gradients, strict=True)):
        takes = all(t.device.type == "cpu" for t in group) and lie_alike(group)
        (ours if takes else others).append(index)
    outputs = [one[i] for one in lists for i in ours]
    inputs = [gradients[i] for i in ours]
    apart = core().disjoint(
        [t.data_ptr() for t in outputs],
        [t.nbytes for t in outputs],
        [t.data_ptr() for t in inputs],
        [t.nbytes for t in inputs],
    )
    return (ours, others) if apart else ([], list(range(len(gradients))))


def _arrays(
    ours: Sequence[int],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    copies: Sequence[Tensor],
) -> dict[str, Any]:
    return {
        "weights": _addresses(ours, weights),
        "gradients": _addresses(ours, gradients),
        "gradient_carriers": [CARRIERS[gradients[i].dtype] for i in ours],
        "means": _addresses(ours, means),
        "copies": _addresses(ours, copies),
        "copy_carriers": [CARRIERS[copies[i].dtype] for i in ours if copies],
        "sizes": [weights[i].numel() for i in ours],
    }


def _addresses(ours: Sequence[int], tensors: Sequence[Tensor]) -> list[int]:
    return [tensors[i].data_ptr() for i in ours if tensors]
