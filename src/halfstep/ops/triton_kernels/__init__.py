"""The GPU back end: kernels in Triton, which is imported at the first use of one.

Equal to the reference bit for bit. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfstep.format import (
    Accumulator,
    BlockFormat,
    Format,
    Kind,
    Order,
    Overflow,
    Rounding,
    ScaleRule,
    Subnormals,
    Unit,
)
from halfstep.ops import block_reference, reference
from halfstep.ops.layout import (
    PLAIN,
    in_memory_order,
    is_dense,
    overlaps,
    refuses_memory,
    starts,
)
from halfstep.ops.random_bits import Key
from halfstep.ops.triton_kernels.grid import blocks_of, grid_of, sums_of
from halfstep.ops.triton_kernels.tensor_table import PART, tabulate

__all__ = [
    "block_of",
    "count_nonfinite",
    "kernels_of",
    "launching",
    "matmul_into",
    "missing",
    "refuses_blocks",
    "refuses_gradients",
    "refuses_matmul",
    "refuses_round",
    "round_blocks_into",
    "round_into",
    "unscale",
]

_CARRIERS = (torch.float32, torch.float16, torch.bfloat16)
# dtype -> the integer of its size, and the bits of infinity
_WORDS = {
    torch.float32: ("int32", 0x7F800000),
    torch.float16: ("int16", 0x7C00),
    torch.bfloat16: ("int16", 0x7F80),
    torch.float64: ("int64", 0x7FF << 52),
}
_BLOCK = 2048  # elements of one program: 16 a thread, four loads of 16 bytes
_TILE = (64, 64)  # sums of one program: 32 a thread
_TILE_INTERPRETED = (16, 32)
_MOST_DIGITS = 22  # two less than float32's, which a rounding in two steps needs to be exact
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
    if format is None or format.kind is Kind.BINARY or not _knows(format):
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
        block = block_of(_BLOCK_INTERPRETED)
        with launching(source.device):
            kernels_of("rounding").round_kernel[(-(-count // block),)](
                source,
                rounded,
                count,
                *_signed(key.low, key.high, key.used),
                to=grid_of(format, rounding),
                BLOCK=block,
            )
    if direct:
        torch.autograd.graph.increment_version(out)
    else:
        target.copy_(rounded)


def refuses_matmul(accumulator: Accumulator, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot add like that; empty if they can."""
    plain = (
        not isinstance(accumulator.adder, Unit)
        and accumulator.order is Order.SEQUENTIAL
        and accumulator.split == 1
        and not accumulator.compensated
    )
    if not plain:
        return f"no Triton kernel adds as {accumulator} does"
    takes = (
        _knows(accumulator.format)
        if accumulator.rounding is Rounding.STOCHASTIC
        else _takes(accumulator.format, accumulator.rounding)
    )
    if not takes:
        return f"no Triton kernel adds in {accumulator.adder}"
    own = accumulator.between == accumulator.adder
    if not own and not _takes(accumulator.between, Rounding.NEAREST):
        return f"no Triton kernel adds in {accumulator.between}"
    if torch.version.hip:
        return "the Triton kernel needs the directed roundings of CUDA's FMA"
    return _refuses_device(tensors) or refuses_memory(tensors)


def _knows(format: Format) -> bool:
    """Whether the format is signed with zero and subnormals, does not wrap, and knows no odd exponents."""
    return (
        format.has_zero
        and format.signed
        and not format.odd_exponents
        and format.overflow is not Overflow.WRAP
        and format.subnormals is Subnormals.KEEP
    )


def _takes(format: Format, rounding: Rounding) -> bool:
    """Whether float32 sums, rounded to odd, can be rounded to the format once more, or need not."""
    if not _knows(format):
        return False
    digits = format.precision if format.kind is Kind.FLOAT else format.bits - 1
    return digits <= _MOST_DIGITS or grid_of(format, rounding).is_float32


def matmul_into(
    out: Tensor, a: Tensor, b: Tensor, initial: Tensor, accumulator: Accumulator, key: Key
) -> None:
    """Writes ``a @ b + initial`` to ``out``, added as the accumulator says; see `halfstep.matmul`.

    ``out`` is contiguous; ``a`` and ``b`` may be broadcast.
    """
    if not out.numel():
        return
    start = accumulator.between if accumulator.chunk else accumulator.format
    rounds = reference.round_into if initial.dtype is torch.float64 else round_into
    rounds(out, initial, start, Rounding.NEAREST, key)
    a_starts, b_starts = starts(a), starts(b)
    (m, depth), n = a.shape[-2:], b.shape[-1]
    rows, columns = _TILE_INTERPRETED if is_interpreted() else _TILE
    tiles = len(a_starts) * (-(-m // rows)) * (-(-n // columns))
    with launching(out.device):
        kernels_of("products").matmul_kernel[(tiles,)](
            a,
            b,
            out,
            a_starts,
            b_starts,
            m,
            n,
            depth,
            *a.stride()[-2:],
            *b.stride()[-2:],
            *_signed(key.low, key.high),
            sums=sums_of(accumulator),
            ROWS=rows,
            COLUMNS=columns,
        )
    torch.autograd.graph.increment_version(out)


def refuses_blocks(element: Format | None, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot round these tensors to blocks of that format; empty if they can."""
    return refuses_round(element, tensors)


def round_blocks_into(
    out: Tensor, x: Tensor, format: BlockFormat, dim: int, rounding: Rounding, key: Key
) -> None:
    """Writes ``x`` as the block format has it; see `halfstep.ops.round_blocks`.

    Scales by amax, tiles, and extents that are no power of two go to the reference.
    """
    extent = format.columns
    if (
        format.rule is ScaleRule.AMAX
        or format.rows != 1
        or not 0 < extent <= _BLOCK
        or extent & (extent - 1)
    ):
        block_reference.round_into(out, x, format, dim, rounding, key)
        return
    source = x.detach().resolve_neg().contiguous()
    direct = out.is_contiguous() and not out.is_neg() and not overlaps(out, source)
    rounded = out if direct else torch.empty_like(source)
    if source.numel():
        length, inner = source.shape[dim], math.prod(source.shape[dim + 1 :])
        count = source.numel() // length * -(-length // extent)
        at_once = max(block_of(_BLOCK_INTERPRETED) // extent, 1)
        with launching(source.device):
            kernels_of("blocks").round_blocks_kernel[(-(-count // at_once),)](
                source,
                rounded,
                count,
                length,
                inner,
                *_signed(key.low, key.high),
                to=blocks_of(format, rounding),
                BLOCKS=at_once,
                EXTENT=extent,
            )
    if direct:
        torch.autograd.graph.increment_version(out)
    else:
        out.copy_(rounded)


def refuses_gradients(format: object, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot take these gradients; empty if they can."""
    return _refuses_device(tensors)


def count_nonfinite(tensors: Sequence[Tensor]) -> list[int]:
    """How many elements of each tensor are infinite or NaN; see `halfstep.ops.count_nonfinite`.

    One launch for each dtype, and one wait, for the answer.
    """
    answer = [0] * len(tensors)
    found: list[Tensor] = []
    order: list[int] = []
    ours, others = _by_dtype(tensors, tuple(_WORDS))
    for dtype, group in ours.items():
        word, infinity = _WORDS[dtype]
        table = tabulate([tensors[i] for i in group])
        counts = torch.zeros(len(group), dtype=torch.int64, device=tensors[0].device)
        if table.programs:
            kernels = kernels_of("gradients")
            with launching(counts.device):
                kernels.count_kernel[(table.programs,)](
                    *table.columns,
                    counts,
                    word=getattr(kernels.tl, word),
                    infinity=infinity,
                    aligned=table.aligned,
                    PART=PART,
                    BLOCK=block_of(PART),
                )
        found.append(counts)
        order += group
    for index, count in zip(order, torch.cat(found).tolist() if found else [], strict=True):
        answer[index] = count
    rest = reference.count_nonfinite([tensors[i] for i in others]) if others else []
    for index, count in zip(others, rest, strict=True):
        answer[index] = count
    return answer


def unscale(tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """FP32 copies over ``scale``; see `halfstep.ops.unscale`. One launch for each dtype."""
    ours, others = _by_dtype(tensors, (torch.float16, torch.bfloat16))
    wide = {i: reference.unscale([tensors[i]], scale)[0] for i in others}
    for dtype, group in ours.items():
        wide |= {i: torch.empty_like(tensors[i], dtype=torch.float32) for i in group}
        table = tabulate([tensors[i] for i in group], [wide[i] for i in group])
        if table.programs:
            kernels = kernels_of("gradients")
            with launching(tensors[0].device):
                kernels.unscale_kernel[(table.programs,)](
                    *table.columns,
                    scale,
                    number=getattr(kernels.tl, str(dtype).removeprefix("torch.")),
                    aligned=table.aligned,
                    PART=PART,
                    BLOCK=block_of(PART),
                )
    return [wide[i] for i in range(len(tensors))]


def _by_dtype(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> tuple[dict[torch.dtype, list[int]], list[int]]:
    """The places of tensors that fill their memory, by dtype; and those of the others."""
    ours: dict[torch.dtype, list[int]] = {}
    others: list[int] = []
    for index, tensor in enumerate(tensors):
        takes = (
            type(tensor) in PLAIN
            and tensor.device == tensors[0].device
            and tensor.dtype in dtypes
            and (tensor.is_contiguous() or is_dense(tensor))
            and not tensor.is_neg()
        )
        (ours.setdefault(tensor.dtype, []) if takes else others).append(index)
    return ours, others


def block_of(size: int) -> int:
    """Elements of one program at a time; ``size`` in the interpreter."""
    return size if is_interpreted() else _BLOCK


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
    return kernels_of("rounding").INTERPRETED.value


@cache
def kernels_of(theme: str) -> Any:
    """The module of kernels of that name; imports Triton."""
    return importlib.import_module(f"halfstep.ops.triton_kernels.{theme}")


def launching(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A launch goes to the current device; the interpreter, in numpy, warns of every infinity."""
    return torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")


def _signed(*words: int) -> tuple[int, ...]:
    """Words of 32 bits as int32, whatever they are: another type would be another kernel."""
    return tuple(word - (word >> 31 << 32) for word in words)
