"""2:4 structured sparsity: two of every four consecutive numbers stay, as sparse matrix units want it."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from halfstep.errors import OperandError, UnknownNameError

__all__ = ["Sparse", "compressed", "prune_2_4"]


class Sparse(Enum):
    """Which operand of a product is 2:4 sparse."""

    NONE = "none"
    A = "a"
    B = "b"

    @classmethod
    def parse(cls, given: object) -> Sparse:
        """The member of that name, `Sparse.NONE` for None; a `Sparse` is returned as it is."""
        if given is None:
            return cls.NONE
        try:
            return cls(given)
        except ValueError:
            raise UnknownNameError("sparse", given, [member.value for member in cls]) from None


def prune_2_4(x: Tensor, dim: int = -1) -> Tensor:
    """``x`` with +0 for two of every four consecutive numbers along ``dim``: the smaller ones.

    Shape and dtype of ``x``. Of equal magnitudes the first ones stay; NaN is larger than all, so an
    error stays visible. Pruning what is pruned changes nothing.

    Gradient: that of what stays, and zero for the rest, which is the true derivative wherever no two
    magnitudes are equal. For a straight-through one write ``x + (prune_2_4(x) - x).detach()``.

    Raises `OperandError` where ``dim`` is no dimension of ``x`` or its size no multiple of 4.

    >>> prune_2_4(torch.tensor([1.0, -3.0, 2.0, 2.0, 0.0, 0.0, 5.0, 0.0])).tolist()
    [0.0, -3.0, 2.0, 0.0, 0.0, 0.0, 5.0, 0.0]

    Source: NVIDIA A100 Tensor Core GPU Architecture whitepaper, 2020, fine-grained structured
    sparsity; A. Mishra et al., Accelerating sparse deep neural networks, arXiv 2104.08378 (not checked).
    """
    groups = _groups(x, dim)
    keep = torch.zeros(groups.shape, dtype=torch.bool, device=x.device)
    keep.scatter_(-1, _kept(groups), True)
    keep = keep.flatten(-2).movedim(-1, dim)
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def compressed(a: Tensor) -> tuple[Tensor, Tensor]:
    """The two numbers that stay of every four along the last dimension, and their places in it.

    Both (..., K / 2), in the order of k; places are int64.
    """
    groups = _groups(a, -1)
    kept = _kept(groups)
    first = torch.arange(0, a.shape[-1], 4, device=a.device)[:, None]
    return groups.gather(-1, kept).flatten(-2), (first + kept).flatten(-2)


def _groups(x: Tensor, dim: int) -> Tensor:
    if not -x.dim() <= dim < x.dim() or x.shape[dim] % 4:
        raise OperandError(
            f"2:4 sparsity: dimension {dim} of shape {tuple(x.shape)}; "
            "wanted: a dimension whose size is a multiple of 4"
        )
    return x.movedim(dim, -1).unflatten(-1, (-1, 4))


def _kept(groups: Tensor) -> Tensor:
    """(..., 2): which two of four stay, ascending."""
    order = torch.sort(groups.detach().abs(), dim=-1, descending=True, stable=True).indices
    return order[..., :2].sort(dim=-1).values
