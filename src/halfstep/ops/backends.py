"""One table, op x device -> function, and the reason for each choice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import OperandError, UnknownNameError
from halfstep.format import Accumulator, Format
from halfstep.ops import (
    block_reference,
    integer_sums,
    native,
    native_blocks,
    native_step,
    native_units,
    reference,
    step_reference,
    summation,
    triton_kernels,
    triton_step,
)

__all__ = ["TABLE", "Backend", "Choice", "Row", "choose", "explain"]


class Backend(Enum):
    """Who computes."""

    AUTO = "auto"
    """The first row of the table that can."""
    REFERENCE = "reference"
    NATIVE = "native"
    TRITON = "triton"
    """On GPUs."""

    @classmethod
    def parse(cls, given: object) -> Backend:
        """The back end of that name; a `Backend` is returned as it is."""
        if isinstance(given, cls):
            return given
        try:
            return cls(given)
        except ValueError:
            known = [member.value for member in cls]
            raise UnknownNameError("backend", given, known) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One implementation of one op."""

    op: str
    device: str
    """A device type, or "any"."""
    backend: Backend
    function: Callable[..., Any]
    refuses: Callable[[Any, Sequence[Tensor]], str]
    """Why it cannot do what is asked (a `Format`, an `Accumulator`, or None) to these tensors, or empty."""
    covers: str
    """What it can do, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An implementation, and why it was chosen."""

    function: Callable[..., Any]
    backend: Backend
    reason: str


def _refuses_nothing(asked: object, tensors: Sequence[Tensor]) -> str:
    return ""


def _on_gpu(
    op: str,
    function: Callable[..., Any],
    refuses: Callable[[Any, Sequence[Tensor]], str],
    covers: str,
) -> tuple[Row, Row]:
    """Triton's rows: on a GPU, and in its interpreter, which is slow and is only had by name."""

    def row(device: str, covers: str) -> Row:
        return Row(
            op=op,
            device=device,
            backend=Backend.TRITON,
            function=function,
            refuses=refuses,
            covers=covers,
        )

    return row("cuda", covers), row("cpu", "the same, in Triton's interpreter, for tests")


_ROUND_ON_GPU, _ROUND_INTERPRETED = _on_gpu(
    "round_to",
    triton_kernels.round_into,
    triton_kernels.refuses_round,
    "eXmY, e4m3fn, e3m2, e2m3, e2m1, intN, qI.F, ternary; every rounding; no float64",
)

_MATMUL_ON_GPU, _MATMUL_INTERPRETED = _on_gpu(
    "matmul",
    triton_kernels.matmul_into,
    triton_kernels.refuses_matmul,
    "formats up to 22 digits and fp32, sequential, in chunks; every rounding; CUDA",
)

_BLOCKS_ON_GPU, _BLOCKS_INTERPRETED = _on_gpu(
    "round_blocks",
    triton_kernels.round_blocks_into,
    triton_kernels.refuses_blocks,
    "1xC blocks with scales that are powers of two (MX), no float64; the rest it passes to the reference",
)
_COUNT_ON_GPU, _COUNT_INTERPRETED = _on_gpu(
    "count_nonfinite",
    triton_kernels.count_nonfinite,
    triton_kernels.refuses_gradients,
    "dense float32, float64, float16, bfloat16; the rest it passes to the reference",
)
_UNSCALE_ON_GPU, _UNSCALE_INTERPRETED = _on_gpu(
    "unscale",
    triton_kernels.unscale,
    triton_kernels.refuses_gradients,
    "dense float16 and bfloat16; the rest it passes to the reference",
)

_ADAM_ON_GPU, _ADAM_INTERPRETED = _on_gpu(
    "adam_step",
    triton_step.adam,
    triton_step.refuses_step,
    "weights, gradients, moments and copies that lie alike; the rest it passes to the reference",
)
_SGD_ON_GPU, _SGD_INTERPRETED = _on_gpu(
    "sgd_step",
    triton_step.sgd,
    triton_step.refuses_step,
    "weights, gradients, buffers and copies that lie alike; the rest it passes to the reference",
)

# In order of preference.
TABLE = (
    Row(
        op="round_to",
        device="cpu",
        backend=Backend.NATIVE,
        function=native.round_into,
        refuses=native.refuses_round,
        covers="eXmY, e4m3fn, e3m2, e2m3, e2m1, intN, qI.F, ternary; every rounding",
    ),
    _ROUND_ON_GPU,
    Row(
        op="round_to",
        device="any",
        backend=Backend.REFERENCE,
        function=reference.round_into,
        refuses=_refuses_nothing,
        covers="every format and rounding",
    ),
    _ROUND_INTERPRETED,
    Row(
        op="matmul",
        device="cpu",
        backend=Backend.NATIVE,
        function=native_units.matmul_into,
        refuses=native_units.refuses_matmul,
        covers="matrix units, and their chunks that are added in fp32; in vectors of any width",
    ),
    Row(
        op="matmul",
        device="cpu",
        backend=Backend.NATIVE,
        function=integer_sums.matmul_into,
        refuses=integer_sums.refuses_matmul,
        covers="intN and qI.F operands whose sum cannot leave the accumulator: an exact library product",
    ),
    Row(
        op="matmul",
        device="cpu",
        backend=Backend.NATIVE,
        function=native_units.fixed_into,
        refuses=native_units.refuses_fixed,
        covers="intN and qI.F operands, a saturating accumulator of them step by step; in vectors",
    ),
    Row(
        op="matmul",
        device="cpu",
        backend=Backend.NATIVE,
        function=native.matmul_into,
        refuses=native.refuses_matmul,
        covers="every accumulator; fastest sequential, up to 14 mantissa bits or fp32, finite operands",
    ),
    _MATMUL_ON_GPU,
    Row(
        op="matmul",
        device="any",
        backend=Backend.REFERENCE,
        function=summation.matmul_into,
        refuses=_refuses_nothing,
        covers="every accumulator",
    ),
    _MATMUL_INTERPRETED,
    Row(
        op="quantize_blocks",
        device="cpu",
        backend=Backend.NATIVE,
        function=native_blocks.quantize,
        refuses=native_blocks.refuses,
        covers="elements of up to 8 bits in float32, float16, bfloat16; the rest goes to the reference",
    ),
    Row(
        op="quantize_blocks",
        device="any",
        backend=Backend.REFERENCE,
        function=block_reference.quantize,
        refuses=_refuses_nothing,
        covers="every block format, axis and rounding",
    ),
    Row(
        op="dequantize_blocks",
        device="cpu",
        backend=Backend.NATIVE,
        function=native_blocks.dequantize_into,
        refuses=native_blocks.refuses,
        covers="elements of up to 8 bits in float32, float16, bfloat16; the rest goes to the reference",
    ),
    Row(
        op="dequantize_blocks",
        device="any",
        backend=Backend.REFERENCE,
        function=block_reference.dequantize_into,
        refuses=_refuses_nothing,
        covers="every block format and axis",
    ),
    _BLOCKS_ON_GPU,
    Row(
        op="round_blocks",
        device="cpu",
        backend=Backend.NATIVE,
        function=native_blocks.round_into,
        refuses=native_blocks.refuses,
        covers="elements of up to 8 bits in float32, float16, bfloat16; the rest goes to the reference",
    ),
    Row(
        op="round_blocks",
        device="any",
        backend=Backend.REFERENCE,
        function=block_reference.round_into,
        refuses=_refuses_nothing,
        covers="every block format, axis and rounding",
    ),
    _BLOCKS_INTERPRETED,
    Row(
        op="count_nonfinite",
        device="cpu",
        backend=Backend.NATIVE,
        function=native.count_nonfinite,
        refuses=native.refuses_count,
        covers="dense float32, float64, float16, bfloat16; the rest it passes to the reference",
    ),
    _COUNT_ON_GPU,
    Row(
        op="count_nonfinite",
        device="any",
        backend=Backend.REFERENCE,
        function=reference.count_nonfinite,
        refuses=_refuses_nothing,
        covers="every dtype and layout",
    ),
    _COUNT_INTERPRETED,
    Row(
        op="unscale",
        device="cpu",
        backend=Backend.NATIVE,
        function=native.unscale,
        refuses=native.refuses_count,
        covers="dense float16 and bfloat16; the rest it passes to the reference",
    ),
    _UNSCALE_ON_GPU,
    Row(
        op="unscale",
        device="any",
        backend=Backend.REFERENCE,
        function=reference.unscale,
        refuses=_refuses_nothing,
        covers="every floating-point dtype",
    ),
    _UNSCALE_INTERPRETED,
    Row(
        op="adam_step",
        device="cpu",
        backend=Backend.NATIVE,
        function=native_step.adam,
        refuses=native_step.refuses_step,
        covers="weights, gradients, moments and copies that lie alike; the rest it passes to the reference",
    ),
    _ADAM_ON_GPU,
    Row(
        op="adam_step",
        device="any",
        backend=Backend.REFERENCE,
        function=step_reference.adam,
        refuses=_refuses_nothing,
        covers="every layout",
    ),
    _ADAM_INTERPRETED,
    Row(
        op="sgd_step",
        device="cpu",
        backend=Backend.NATIVE,
        function=native_step.sgd,
        refuses=native_step.refuses_step,
        covers="weights, gradients, buffers and copies that lie alike; the rest it passes to the reference",
    ),
    _SGD_ON_GPU,
    Row(
        op="sgd_step",
        device="any",
        backend=Backend.REFERENCE,
        function=step_reference.sgd,
        refuses=_refuses_nothing,
        covers="every layout",
    ),
    _SGD_INTERPRETED,
)


def _first_choice(row: Row) -> Choice:
    """That of a row before which nothing refused."""
    reason = f"{row.backend.value} covers {row.covers}"
    return Choice(function=row.function, backend=row.backend, reason=reason)


_ROWS = {
    op: tuple((row, _first_choice(row)) for row in TABLE if row.op == op)
    for op in {row.op for row in TABLE}
}


def choose(
    op: str,
    device: torch.device,
    backend: Backend,
    *,
    tensors: Sequence[Tensor],
    asked: Format | Accumulator | None = None,
) -> Choice:
    """The implementation for these operands: the first row that is asked for and does not refuse.

    Says so, once in a process, where the native kernels are not installed. Raises `OperandError`
    if the back end that is asked for cannot do it.
    """
    refusals: list[str] = []
    for row, first in _ROWS.get(op, ()):
        if backend is not Backend.AUTO and row.backend is not backend:
            continue
        if row.device not in (device.type, "any"):
            refusals.append(f"{row.backend.value} runs on {row.device}, not {device.type}")
            continue
        refusal = row.refuses(asked, tensors)
        if not refusal:
            if not refusals:
                return first
            return Choice(function=row.function, backend=row.backend, reason="; ".join(refusals))
        refusals.append(refusal)
        if refusal == native.MISSING and backend is Backend.AUTO:
            _warn_missing()
    raise OperandError(
        f"{op} on {device}: backend {backend.value!r} cannot: {'; '.join(refusals)}; "
        "use backend='auto'"
    )


@cache
def _warn_missing() -> None:
    warnings.warn(
        f"halfstep runs without its native kernels, more slowly: {native.MISSING}. "
        "To build them, install a C++17 compiler and say: pip install --force-reinstall halfstep",
        RuntimeWarning,
        stacklevel=2,
    )


def explain() -> list[tuple[str, str, str, str]]:
    """The table in words, in order of preference: (op, device, back end, what it covers)."""
    return [(row.op, row.device, row.backend.value, row.covers) for row in TABLE]
