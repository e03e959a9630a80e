"""The GPU back end: kernels in Triton, which is imported at the first use of one.

Equal to the reference bit for bit. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfstep.format import Format, Kind, Rounding
from halfstep.ops.layout import in_memory_order, overlaps, refuses_memory
from halfstep.ops.random_bits import Key
from halfstep.ops.triton_kernels.grid import grid_of

__all__ = ["missing", "refuses_round", "round_into"]

_CARRIERS = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 2048  # elements of one program: 16 a thread, four loads of 16 bytes
_BLOCK_INTERPRETED = 2**15  # there a program costs milliseconds, whatever its size


@cache
def missing() -> str:
    """Why Triton cannot be used; empty if it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not there ({error}); pip install 'halfstep[triton]'"
    return ""


def refuses_round(format: Format | None, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot round these tensors to that format; empty if they can."""
    if format is None or format.kind is Kind.BINARY or not format.has_zero:
        return f"{format} has no Triton kernel"
    for tensor in tensors:
        if tensor.dtype not in _CARRIERS:
            return f"no Triton kernel takes {tensor.dtype}"
    return _refuses_device(tensors) or refuses_memory(tensors)


def round_into(out: Tensor, x: Tensor, format: Format, rounding: Rounding, key: Key) -> None:
    """Writes to ``out`` every element of ``x``, rounded once to the format.

    See `halfstep.round_to`.
    """
    source = x.detach().resolve_neg()
    target = out
    if rounding is not Rounding.STOCHASTIC and not source.is_contiguous():
        target, source = in_memory_order(out, source)
    source = source.contiguous()
    direct = target.is_contiguous() and not target.is_neg() and not overlaps(target, source)
    rounded = target if direct else torch.empty_like(source, dtype=torch.float32)
    count = source.numel()
    if count:
        block = _BLOCK_INTERPRETED if is_interpreted() else _BLOCK
        with _launching(source.device):
            _kernels("rounding").round_kernel[(-(-count // block),)](
                source,
                rounded,
                count,
                *_signed(key),
                to=grid_of(format, rounding),
                BLOCK=block,
            )
    if direct:
        torch.autograd.graph.increment_version(out)
    else:
        target.copy_(rounded)


def _refuses_device(tensors: Sequence[Tensor]) -> str:
    if missing():
        return missing()
    if any(t.device.type != "cuda" for t in tensors) and not is_interpreted():
        return (
            "Triton runs on GPUs; on a CPU only its interpreter does, for tests: "
            "set TRITON_INTERPRET=1 before triton is imported"
        )
    return ""


@cache
def is_interpreted() -> bool:
    return _kernels("rounding").INTERPRETED.value


@cache
def _kernels(theme: str) -> Any:
    return importlib.import_module(f"halfstep.ops.triton_kernels.{theme}")


def _launching(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A launch goes to the current device; the interpreter, in numpy, warns of every infinity."""
    return torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")


def _signed(key: Key) -> tuple[int, int]:
    """The halves as int32, whatever they are: another type would be another kernel."""
    return key.low - (key.low >> 31 << 32), key.high - (key.high >> 31 << 32)
