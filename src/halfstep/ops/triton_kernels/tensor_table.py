"""Many tensors for one launch: where each is, and which part of which is each program's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["PART", "TensorTable", "tabulate"]

PART = 2**16
"""Elements of one program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTable:
    """Columns of integers on the tensors' device."""

    columns: tuple[Tensor, ...]
    """Address and size of each tensor; tensor and first element of each program; the other lists."""
    programs: int
    aligned: bool
    """Whether every address is a multiple of 16."""


def tabulate(tensors: Sequence[Tensor], *alike: Sequence[Tensor]) -> TensorTable:
    """The table of tensors that fill their memory, and of lists of as many that lie alike; one copy."""
    addresses = np.array([t.data_ptr() for t in tensors], dtype=np.int64)
    sizes = np.array([t.numel() for t in tensors], dtype=np.int64)
    others = [np.array([t.data_ptr() for t in one], dtype=np.int64) for one in alike]
    parts = -(-sizes // PART)
    which = np.repeat(np.arange(len(tensors)), parts)
    begins = (np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)) * PART
    columns = [addresses, sizes, which, begins, *others]
    table = torch.from_numpy(np.concatenate(columns)).to(tensors[0].device)
    return TensorTable(
        columns=table.split([len(column) for column in columns]),
        programs=len(which),
        aligned=not (np.concatenate([addresses, *others]) % 16).any(),
    )
