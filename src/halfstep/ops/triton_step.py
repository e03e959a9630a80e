"""Optimizer steps on GPUs: one launch for each dtype of gradients. Equal to the reference bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfstep.format import Format, Rounding
from halfstep.ops import step_reference
from halfstep.ops.layout import lie_alike
from halfstep.ops.step_reference import some, written
from halfstep.ops.triton_kernels import block_of, kernels_of, launching, refuses_gradients
from halfstep.ops.triton_kernels.grid import grid_of
from halfstep.ops.triton_kernels.tensor_table import PART, TensorTable, tabulate

if TYPE_CHECKING:
    from halfstep.ops.stepping import AdamNumbers, SgdNumbers

__all__ = ["adam", "refuses_step", "sgd"]

refuses_step = refuses_gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """What kernels are compiled for."""

    scales: bool
    maximize: bool
    penalizes: bool
    decays: bool = False
    near: bool = False
    has_momentum: bool = False
    fresh: bool = False
    nesterov: bool = False


def adam(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: AdamNumbers,
) -> None:
    """One step of Adam or AdamW in place; see `halfstep.ops.adam_step`."""
    rule = _Rule(
        scales=numbers.scale != 1.0,
        maximize=numbers.maximize,
        penalizes=numbers.penalizes,
        decays=numbers.decay != 1.0,
        near=numbers.moment < 0.5,
    )
    groups, others = _groups(gradients, copies, weights, means, squares)
    for places in groups:
        table, constants = _table(places, gradients, copies, weights, means, squares)
        if not table.programs:
            continue
        device = weights[places[0]].device
        corrections = [some(places, numbers.roots), some(places, numbers.steps)]
        roots, steps = torch.tensor(corrections, dtype=torch.float32).to(device)
        with launching(device):
            kernels_of("steps").adam_kernel[(table.programs,)](
                *_columns(table, 8),
                roots,
                steps,
                numbers.scale,
                numbers.penalty,
                numbers.decay,
                numbers.moment,
                numbers.rest,
                numbers.beta2,
                numbers.square,
                numbers.eps,
                rule=rule,
                **constants,
            )
        written(places, weights, means, squares, copies)
    step_reference.adam_at(others, weights, gradients, means, squares, copies, numbers)


def sgd(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: SgdNumbers,
) -> None:
    """One step of SGD in place; see `halfstep.ops.sgd_step`."""
    rule = _Rule(
        scales=numbers.scale != 1.0,
        maximize=numbers.maximize,
        penalizes=numbers.penalizes,
        has_momentum=bool(means),
        fresh=numbers.fresh,
        nesterov=numbers.nesterov,
    )
    buffers = means or weights  # a column that is not read
    groups, others = _groups(gradients, copies, weights, *([means] if means else []))
    for places in groups:
        table, constants = _table(places, gradients, copies, weights, buffers)
        if not table.programs:
            continue
        with launching(weights[places[0]].device):
            kernels_of("steps").sgd_kernel[(table.programs,)](
                *_columns(table, 7),
                numbers.scale,
                numbers.penalty,
                numbers.momentum,
                numbers.gain,
                numbers.step,
                rule=rule,
                **constants,
            )
        written(places, weights, means, copies)
    step_reference.sgd_at(others, weights, gradients, means, copies, numbers)


def _groups(
    gradients: Sequence[Tensor], copies: Sequence[Tensor], *states: Sequence[Tensor]
) -> tuple[list[list[int]], list[int]]:
    """The places of tensors that the kernels take, by the dtypes of gradient and copy; and the others.

    None are where some share memory: one after another, as torch does it, is not all at once.
    """
    lists = [gradients, *states, *([copies] if copies else [])]
    found: dict[Any, list[int]] = {}
    others: list[int] = []
    device = gradients[0].device
    for index, group in enumerate(zip(*lists, strict=True)):
        key = gradients[index].dtype, copies[index].dtype if copies else None
        takes = group[0].device == device and lie_alike(group)
        (found.setdefault(key, []) if takes else others).append(index)
    everything = [one[i] for one in lists for places in found.values() for i in places]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in everything if t.nbytes)
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        return [], list(range(len(gradients)))
    return list(found.values()), others


def _table(
    places: Sequence[int],
    gradients: Sequence[Tensor],
    copies: Sequence[Tensor],
    *states: Sequence[Tensor],
) -> tuple[TensorTable, dict[str, Any]]:
    """Where the tensors are, and the kernel's other constants."""
    alike = [some(places, one) for one in (*states, copies) if one]
    table = tabulate(some(places, gradients), *alike)
    language = kernels_of("gradients").tl
    copy = copies[places[0]].dtype if copies else None
    format = "bf16" if copy is torch.bfloat16 else "fp16"
    return table, {
        "number": _type_of(language, gradients[places[0]].dtype),
        "copy": None if copy is None else _type_of(language, copy),
        "to": grid_of(Format.parse(format), Rounding.NEAREST),
        "aligned": table.aligned,
        "PART": PART,
        "BLOCK": block_of(PART),
        "enable_fp_fusion": False,  # what is rounded once says so
    }


def _columns(table: TensorTable, count: int) -> list[Tensor]:
    """The table's; where there are no copies the weights stand in, and are not read."""
    return [*table.columns, table.columns[4]][:count]


def _type_of(language: Any, dtype: torch.dtype) -> Any:
    return getattr(language, str(dtype).removeprefix("torch."))
