"""What the loss scale asks after every backward: gradients as FP32 over the scale, and are they finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfstep.errors import OperandError
from halfstep.ops.backends import Backend, choose
from halfstep.ops.custom import outside_graphs

__all__ = ["count_nonfinite", "unscale"]


@outside_graphs
def count_nonfinite(
    tensors: Sequence[Tensor], *, backend: Backend | str = Backend.AUTO
) -> list[int]:
    """How many elements of each tensor are infinite or NaN, in the order of the tensors.

    Of any dtype (integers are finite), shape, layout and device; of sparse tensors the values that
    are stored count, duplicates added up. On the CPU one pass at the speed of memory; elsewhere one
    synchronisation for all. No tensors give no counts; an empty tensor has 0.

    Raises `OperandError` for what is no tensor.

    >>> count_nonfinite([torch.tensor([1.0, torch.inf]), torch.zeros(3)])
    [1, 0]
    """
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise OperandError(
                f"count_nonfinite: element {index} is a {type(tensor).__name__}; "
                "allowed: a torch.Tensor"
            )
    if not tensors:
        return []
    with torch.no_grad():
        dense = [_values(tensor) for tensor in tensors]
        device = dense[0].device
        choice = choose("count_nonfinite", device, Backend.parse(backend), tensors=dense)
        return choice.function(dense)


@outside_graphs
def unscale(
    tensors: Sequence[Tensor], scale: float, *, backend: Backend | str = Backend.AUTO
) -> list[Tensor]:
    """Each tensor as a new FP32 tensor over ``scale``: cast and division in one pass over memory.

    NaN and infinity stay what they are. A division by a power of two is exact but for subnormal
    results, which round to nearest. Dense floating-point tensors of one device, at least one of them.

    >>> unscale([torch.tensor([3.0, torch.inf], dtype=torch.float16)], 2.0)
    [tensor([1.5000,    inf])]
    """
    device = tensors[0].device
    choice = choose("unscale", device, Backend.parse(backend), tensors=tensors)
    return choice.function(tensors, scale)


def _values(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.strided:
        return tensor
    return (tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor).values()
