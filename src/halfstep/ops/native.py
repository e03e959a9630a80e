"""The CPU back end: thin calls into ``halfstep._core``. Equal to the reference bit for bit."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfstep.format import (
    Accumulator,
    Format,
    Kind,
    Order,
    Overflow,
    Products,
    Rounding,
    Subnormals,
    Unit,
    overflow,
)
from halfstep.ops import reference
from halfstep.ops.carriers import holds
from halfstep.ops.layout import PLAIN, in_memory_order, is_dense, overlaps, refuses_memory, starts
from halfstep.ops.random_bits import Key


def _load() -> tuple[Any, str]:
    """The extension, and why it cannot be used; imported by name, as it is no Python module."""
    try:
        core = importlib.import_module("halfstep._core")
    except ImportError as error:
        return None, f"the extension halfstep._core is not there ({error})"
    # where only its sources are, that name is an empty namespace package
    if not hasattr(core, "Grid"):
        return core, "the extension halfstep._core is not there"
    if _digest_of_sources() not in ("", getattr(core, "sources", None)):
        return core, (
            "the extension halfstep._core is older than its sources; build it again: "
            "`make setup`, or pip install -e ."
        )
    return core, ""


def _digest_of_sources() -> str:
    """As CMakeLists.txt has it; empty where the sources are not beside the package."""
    files = sorted((Path(__file__).parents[1] / "_core").glob("*.[ch]pp"))
    digests = "".join(sha256(file.read_bytes()).hexdigest() for file in files)
    return sha256(digests.encode()).hexdigest() if files else ""


_core, MISSING = _load()

__all__ = [
    "CARRIERS",
    "CODES",
    "MISSING",
    "core",
    "count_nonfinite",
    "grid_of",
    "instruction_set",
    "matmul_into",
    "refuses_count",
    "refuses_matmul",
    "refuses_round",
    "round_into",
    "rounder",
    "row_rounder",
    "unscale",
]

# as in _core/types.hpp
CARRIERS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_SOURCES = CARRIERS | {
    torch.int8: 4,
    torch.uint8: 5,
    torch.bool: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}
_NEED_FLOAT64 = (torch.float64, torch.int32, torch.int64)
_GRADUAL, _WRAP, _FLUSH, _NO_ZERO = range(4)

CODES = {
    Rounding.NEAREST: 0,
    Rounding.STOCHASTIC: 1,
    Rounding.TOWARD_ZERO: 2,
    Rounding.UP: 3,
    Rounding.DOWN: 4,
    Rounding.AWAY: 5,
    Rounding.TO_ODD: 6,
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
    if format is None or not _has_kernel(format):
        return f"{format} has no native kernel"
    return refuses_memory(tensors)


@cache
def _has_kernel(format: Format) -> bool:
    if format.kind is not Kind.FLOAT:
        return format.kind is Kind.FIXED
    if not format.zero:
        return not format.signed and format.min_exponent == -127
    # The kernels know no grid but float32's own below its smallest normal number, and none that is
    # finer than 2^-94, where a number that is subnormal in float32 is still 2^-32 of a spacing.
    if format.min_exponent == -126:
        return format.signed
    return format.signed and format.min_exponent > -126 and format.quantum_exponent >= -94


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
    direct = target.is_contiguous() and not target.is_neg() and not overlaps(target, source)
    rounded = target if direct else torch.empty_like(source, dtype=target.dtype)
    if source.numel():
        in_float64 = source.dtype in _NEED_FLOAT64 or not holds(torch.float32, format)
        _core.round_to(
            source.data_ptr(),
            _SOURCES[source.dtype],
            rounded.data_ptr(),
            CARRIERS[rounded.dtype],
            in_float64,
            source.numel(),
            grid_of(format, rounding, in_float64),
            CODES[rounding],
            key.low,
            key.high,
            key.used,
            torch.get_num_threads(),
        )
    if direct:
        torch.autograd.graph.increment_version(out)
    else:
        target.copy_(rounded)


def rounder(format: Format) -> Callable[[Tensor], Tensor] | None:
    """``x`` rounded to nearest, in a new tensor; None where there is no kernel of the format.

    What can be decided once is: for contiguous FP32 tensors with memory of their own, and no graph.
    """
    if MISSING or not _has_kernel(format):
        return None
    in_float64 = not holds(torch.float32, format)
    grid, code = grid_of(format, Rounding.NEAREST, in_float64), CODES[Rounding.NEAREST]
    kernel, carrier = _core.round_to, CARRIERS[torch.float32]
    key = Key()
    bits = key.low, key.high, key.used

    def rounded(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        if x.numel():
            memory = x.data_ptr(), carrier, out.data_ptr(), carrier
            kernel(*memory, in_float64, x.numel(), grid, code, *bits, torch.get_num_threads())
        return out

    return rounded


def row_rounder(format: Format) -> Callable[[Tensor, Tensor | None], None] | None:
    """Rounds rows where they are, after a row was added to each; None where there is no kernel of the format.

    What can be decided once is: for contiguous FP32 tensors with memory of their own, and no graph.
    """
    if MISSING or not _has_kernel(format) or not holds(torch.float32, format):
        return None
    grid, kernel = grid_of(format, Rounding.NEAREST, in_float64=False), _core.round_rows

    def rounded(made: Tensor, row: Tensor | None) -> None:
        n = made.numel()
        if n:
            columns, added = made.shape[-1], 0 if row is None else row.data_ptr()
            kernel(made.data_ptr(), n // columns, columns, added, grid, torch.get_num_threads())

    return rounded


def refuses_matmul(accumulator: Accumulator, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot add like that; empty if they can."""
    return MISSING or _refuses_sum(accumulator) or refuses_memory(tensors)


@cache
def _refuses_sum(accumulator: Accumulator) -> str:
    adder = accumulator.adder
    if isinstance(adder, Unit):
        return "units have kernels of their own"
    if accumulator.rounding is Rounding.TO_ODD:
        return "no native kernel adds to odd"
    for format in (adder, accumulator.between):
        # the kernels write float32
        wide = format.kind is Kind.FIXED and format.bits > 25
        if wide or format.subnormals is Subnormals.FLUSH or format.overflow is Overflow.WRAP:
            return refuses_round(format, ()) or f"no native kernel adds in {format}"
        if refusal := refuses_round(format, ()):
            return refusal
    return ""


def matmul_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    initial: Tensor,
    accumulator: Accumulator,
    key: Key,
    operands: tuple[Format | None, Format | None] = (None, None),
) -> None:
    """Writes ``a @ b + initial`` to ``out``, added as the accumulator says; see `halfstep.matmul`.

    ``out`` is contiguous; ``a``, ``b`` and ``initial`` may be broadcast. ``operands``: what ``a`` and
    ``b`` are rounded to on the way, which float32 holds and `refuses_round` does not refuse.
    """
    if not out.numel():
        return
    one = initial.dtype is torch.float32 and not any(initial.stride())
    if not one:
        round_into(out, initial, _start(accumulator), Rounding.NEAREST, key)
    a_starts, b_starts = starts(a), starts(b)
    _core.dot(
        a=a.data_ptr(),
        a_starts=a_starts.data_ptr(),
        a_row=a.stride(-2),
        a_column=a.stride(-1),
        b=b.data_ptr(),
        b_starts=b_starts.data_ptr(),
        b_row=b.stride(-2),
        b_column=b.stride(-1),
        out=out.data_ptr(),
        start=initial.data_ptr() if one else 0,
        batch=len(a_starts),
        m=a.shape[-2],
        n=b.shape[-1],
        k=a.shape[-1],
        round_a=_operand_grid(operands[0]),
        round_b=_operand_grid(operands[1]),
        sum=_sum(accumulator),
        key_low=key.low,
        key_high=key.high,
        threads=torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(out)


def _operand_grid(format: Format | None) -> Any:
    return None if format is None else grid_of(format, Rounding.NEAREST, in_float64=False)


def _start(accumulator: Accumulator) -> Format:
    """What the numbers that sums start from are rounded to."""
    grouped = accumulator.chunk > 0 or accumulator.split > 1
    return accumulator.between if grouped else accumulator.format


@cache
def _sum(accumulator: Accumulator) -> Any:
    between_differs = accumulator.between != accumulator.adder
    between = Rounding.NEAREST if between_differs else accumulator.rounding
    pairwise = accumulator.order is Order.PAIRWISE
    return _core.DotSum(
        adder=grid_of(accumulator.format, accumulator.rounding, in_float64=True),
        between=grid_of(accumulator.between, between, in_float64=True),
        start=grid_of(_start(accumulator), Rounding.NEAREST, in_float64=True),
        between_differs=between_differs,
        rounding=CODES[accumulator.rounding],
        products_rounded=accumulator.products is Products.ROUNDED,
        order=1 if pairwise else 2 if accumulator.compensated else 0,
        chunk=accumulator.chunk,
        split=accumulator.split,
    )


def refuses_count(format: Format | None, tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot count; empty if they can."""
    return MISSING


def count_nonfinite(tensors: Sequence[Tensor]) -> list[int]:
    """How many elements of each tensor are infinite or NaN; see `halfstep.ops.count_nonfinite`."""
    arrays: list[int] = []
    sizes: list[int] = []
    carriers: list[int] = []
    others: list[int] = []
    for index, tensor in enumerate(tensors):  # after every backward, for every parameter
        carrier = CARRIERS.get(tensor.dtype, -1)
        if (
            carrier < 0
            or type(tensor) not in PLAIN
            or not tensor.is_cpu
            or not tensor.is_contiguous()
        ):
            others.append(index)
        else:
            arrays.append(tensor.data_ptr())
            sizes.append(tensor.numel())
            carriers.append(carrier)
    counts: list[int] = _core.count_nonfinite(arrays, sizes, carriers, torch.get_num_threads())
    if others:
        found = reference.count_nonfinite([tensors[i] for i in others])
        for index, count in zip(others, found, strict=True):
            counts.insert(index, count)
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
        [CARRIERS[tensors[i].dtype] for i in ours],
        scale,
        torch.get_num_threads(),
    )
    return wide


@cache
def grid_of(format: Format, rounding: Rounding, in_float64: bool) -> Any:
    """The format as the kernels know it, for numbers that are rounded in float64 or in float32."""
    digits = 52 if in_float64 else 23
    ends = _GRADUAL
    if not format.zero:
        ends = _NO_ZERO
    elif format.subnormals is Subnormals.FLUSH:
        ends = _FLUSH
    elif format.overflow is Overflow.WRAP:
        ends = _WRAP
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
        ends=ends,
        # the carriers' biases are odd
        odd_exponents=format.bias % 2 if format.odd_exponents else -1,
        span=2.0 ** (format.bits + format.quantum_exponent) if ends == _WRAP else 0.0,
    )


def _becomes(format: Format, rounding: Rounding, *, negative: bool, finite: bool) -> float:
    return float(overflow(format, rounding, negative=negative, finite=finite))
