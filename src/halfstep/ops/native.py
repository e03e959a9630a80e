"""The CPU back end: thin calls into ``halfstep._core``. Equal to the reference bit for bit."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfstep.format import Accumulator, Format, Kind, Rounding, Specials, Unit, overflow
from halfstep.ops import reference
from halfstep.ops.layout import PLAIN, in_memory_order, is_dense, overlaps, refuses_memory, starts
from halfstep.ops.random_bits import Key


def _load() -> tuple[Any, str]:
    """The extension, and why it is missing; imported by name, as it is no Python module."""
    try:
        core = importlib.import_module("halfstep._core")
    except ImportError as error:
        return None, f"the extension halfstep._core is not there ({error})"
    # where only its sources are, that name is an empty namespace package
    missing = "" if hasattr(core, "Grid") else "the extension halfstep._core is not there"
    return core, missing


_core, MISSING = _load()

__all__ = [
    "MISSING",
    "core",
    "count_nonfinite",
    "instruction_set",
    "matmul_into",
    "refuses_count",
    "refuses_matmul",
    "refuses_round",
    "round_into",
    "unscale",
]

_MOST_DIGITS = 22  # two less than float32's, which a rounding in two steps needs to be exact

# as in _core/types.hpp
_CARRIERS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# dtype -> the one that its numbers are rounded in
_WIDE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}

_CODES = {
    Rounding.NEAREST: 0,
    Rounding.STOCHASTIC: 1,
    Rounding.TOWARD_ZERO: 2,
    Rounding.UP: 3,
    Rounding.DOWN: 4,
    Rounding.AWAY: 5,
}


def core() -> Any:
    """The extension, where it is not `MISSING`."""
    return _core


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Runs the native kernels in that instruction set for a while; for tests."""
    before = _core.instruction_set()
    _core.use_instruction_set(name)
    try:
        yield
    finally:
        _core.use_instruction_set(before)


def refuses_round(format: Format | None, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot round these tensors to that format; empty if they can."""
    if MISSING:
        return MISSING
    # e1m0, whose smallest step is 2, would scale the least float32 numbers to nothing
    if (
        format is None
        or format.kind is Kind.BINARY
        or not format.has_zero
        or format.quantum_exponent > 0
    ):
        return f"{format} has no native kernel"
    return refuses_memory(tensors)


def round_into(out: Tensor, x: Tensor, format: Format, rounding: Rounding, key: Key) -> None:
    """Writes to ``out`` every element of ``x``, rounded once to the format.

    See `halfstep.round_to`.
    """
    source = x.detach().resolve_neg()
    target = out
    if rounding is not Rounding.STOCHASTIC and not source.is_contiguous():
        # element by element, whatever their order: walk a transposed tensor as it lies
        target, source = in_memory_order(out, source)
    source = source.contiguous()
    direct = (
        target.is_contiguous()
        and (source.dtype is torch.float64) is (target.dtype is torch.float64)
        and not target.is_neg()
        and not overlaps(target, source)
    )
    rounded = target if direct else torch.empty_like(source, dtype=_WIDE[source.dtype])
    if source.numel():
        _core.round_to(
            source.data_ptr(),
            _CARRIERS[source.dtype],
            rounded.data_ptr(),
            _CARRIERS[rounded.dtype],
            source.numel(),
            _grid(format, rounding, _WIDE[source.dtype]),
            _CODES[rounding],
            key.low,
            key.high,
            torch.get_num_threads(),
        )
    if direct:
        torch.autograd.graph.increment_version(out)
    else:
        target.copy_(rounded)


def refuses_matmul(accumulator: Accumulator, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot add like that; empty if they can."""
    adder = accumulator.adder
    if isinstance(adder, Unit):
        return "units have kernels of their own"
    if adder.specials is not Specials.IEEE or adder.precision > _MOST_DIGITS:
        return f"no native kernel adds in {adder}"
    if accumulator != Accumulator.parse(adder):
        return f"no native kernel adds as {accumulator} does"
    return refuses_round(adder, tensors)


def matmul_into(
    out: Tensor, a: Tensor, b: Tensor, initial: Tensor, accumulator: Accumulator, key: Key
) -> None:
    """Writes ``a @ b + initial`` to ``out``, added as the accumulator says; see `halfstep.matmul`.

    ``out`` is contiguous; ``a`` and ``b`` may be broadcast.
    """
    if not out.numel():
        return
    round_into(out, initial.to(torch.float32), accumulator.format, Rounding.NEAREST, key)
    a_starts, b_starts = starts(a), starts(b)
    _core.dot_accumulate(
        a=a.data_ptr(),
        a_starts=a_starts.data_ptr(),
        a_row=a.stride(-2),
        a_column=a.stride(-1),
        b=b.data_ptr(),
        b_starts=b_starts.data_ptr(),
        b_row=b.stride(-2),
        b_column=b.stride(-1),
        out=out.data_ptr(),
        batch=len(a_starts),
        m=a.shape[-2],
        n=b.shape[-1],
        k=a.shape[-1],
        grid=_grid(accumulator.format, Rounding.NEAREST, torch.float32),
        threads=torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(out)


def refuses_count(format: Format | None, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot count; empty if they can."""
    return MISSING


def count_nonfinite(tensors: Sequence[Tensor]) -> list[int]:
    """How many elements of each tensor are infinite or NaN; see `halfstep.ops.count_nonfinite`."""
    counts = [0] * len(tensors)
    ours: list[int] = []
    others: list[int] = []
    for index, tensor in enumerate(tensors):
        takes = (
            type(tensor) in PLAIN
            and tensor.device.type == "cpu"
            and tensor.dtype in _CARRIERS
            and tensor.is_contiguous()
        )
        (ours if takes else others).append(index)
    found = _core.count_nonfinite(
        [tensors[i].data_ptr() for i in ours],
        [tensors[i].numel() for i in ours],
        [_CARRIERS[tensors[i].dtype] for i in ours],
        torch.get_num_threads(),
    )
    for index, count in zip(ours, found, strict=True):
        counts[index] = count
    if others:
        found = reference.count_nonfinite([tensors[i] for i in others])
        for index, count in zip(others, found, strict=True):
            counts[index] = count
    return counts


def unscale(tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """FP32 copies over ``scale``; see `halfstep.ops.unscale`."""
    wide: list[Tensor] = []
    ours: list[int] = []
    for index, tensor in enumerate(tensors):
        takes = (
            type(tensor) in PLAIN
            and tensor.dtype in (torch.float16, torch.bfloat16)
            and (tensor.is_contiguous() or is_dense(tensor))
        )
        if takes:
            wide.append(torch.empty_like(tensor, dtype=torch.float32))
            ours.append(index)
        else:
            wide += reference.unscale([tensor], scale)
    _core.widen(
        [tensors[i].data_ptr() for i in ours],
        [wide[i].data_ptr() for i in ours],
        [tensors[i].numel() for i in ours],
        [_CARRIERS[tensors[i].dtype] for i in ours],
        scale,
        torch.get_num_threads(),
    )
    return wide


@cache
def _grid(format: Format, rounding: Rounding, carrier: torch.dtype) -> Any:
    digits = 52 if carrier is torch.float64 else 23
    return _core.Grid(
        quantum_exponent=format.quantum_exponent,
        mantissa_bits=format.mantissa_bits if format.kind is Kind.FLOAT else digits,
        highest=format.max,
        lowest=format.lowest,
        overflow_up=_becomes(format, rounding, negative=False, finite=True),
        overflow_down=_becomes(format, rounding, negative=True, finite=True),
        infinity_up=_becomes(format, rounding, negative=False, finite=False),
        infinity_down=_becomes(format, rounding, negative=True, finite=False),
        negative_zero=format.has_negative_zero,
    )


def _becomes(format: Format, rounding: Rounding, *, negative: bool, finite: bool) -> float:
    return float(overflow(format, rounding, negative=negative, finite=finite))
