"""`round_to`: the public edge of rounding. Checks and gradient; back ends do the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingModuleSource]
    is_functorch_wrapped_tensor,
)
from torch.autograd import forward_ad

from halfstep.errors import OperandError
from halfstep.format import Format, Kind, Overflow, Rounding, Subnormals
from halfstep.ops import native
from halfstep.ops.backends import Backend, choose
from halfstep.ops.carriers import CARRIERS, INTEGERS, holds, result_dtype
from halfstep.ops.custom import (
    choice_text,
    format_of,
    format_text,
    is_traced,
    operator,
    seed_for,
    straight_through,
)
from halfstep.ops.layout import PLAIN
from halfstep.ops.random_bits import ALL_BITS, Key, draw_key

__all__ = ["round_into", "round_to"]

_NO_KEY = Key()


def round_to(
    x: Tensor,
    format: Format | str,
    rounding: Rounding | str = "nearest",
    out: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    overflow: Overflow | str | None = None,
    subnormals: Subnormals | str | None = None,
    random_bits: int = ALL_BITS,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Every element of ``x`` rounded, once, to the nearest number of ``format``, in ``x``'s dtype.

    ``x`` is float32, float64, float16, bfloat16, an integer (int8 to int64, uint8) or bool, of any
    shape and layout, on any device. The result has ``x``'s shape and dtype and is new; of integers
    it is float32, or float64 for a format that needs it. With ``out`` (same shape and device, any of
    the four floating-point dtypes, may be ``x`` itself or overlap it) it is written there and ``out``
    is returned. A dtype that cannot hold every number of the format is refused.

    ``rounding``: nearest (ties to even) | stochastic | toward_zero | up | down | away (nearest,
    ties away from zero) | to_odd (the neighbour whose last digit is odd). Stochastic takes the
    neighbour farther from zero with probability floor(2^n rest) / 2^n, where rest is the distance to
    the other one in units of their distance and n is ``random_bits``, 1 to 32: with 32 unbiased for
    float32 and 16-bit normal numbers, and to 2^-32 of a unit elsewhere (int64 beyond 2^53: 2^-29).
    Its random bits are the uppermost n of 32 that depend on the ``generator``'s seed (torch's
    default CPU generator where none is given) and on the element's index, on nothing else: not on
    back end, threads or layout.

    - NaN stays NaN, also where the format has none: quiet, sign and payload kept in float32 and
      float64.
    - -0 stays -0, and what rounds to zero from below is -0, in formats that have it; else 0.
    - Overflow becomes what ``overflow`` says (inf | saturate | nan, and for fixed point wrap), where
      it is not given what the format says: a magnitude that would round beyond the largest number if
      exponents had no end. Directed roundings and to_odd stop at the largest number, but not where
      it wraps. Infinity stays; it saturates where overflow does, and is NaN where overflow is and
      the format has no infinity, and where it wraps.
    - Subnormal numbers are exact, whatever the processor's flush-to-zero setting is; with
      ``subnormals="flush"``, or in a format that says so, what would be one after rounding (to the
      format's precision, as if exponents had no lower end) is zero with its sign, in every rounding.
    - binary: -1 below 0, else 1; only nearest and stochastic.
    - e8m0: negative numbers become NaN, zero the smallest number.

    Gradient: straight through, that is, the gradient of the result is passed on to ``x`` unchanged;
    `torch.func` transforms work, too. In `torch.compile` and `torch.export` it is one node, with the
    same results; there a ``generator`` breaks the graph, and torch's default one is used in order.
    ``backend`` is for tests: auto | reference | native | triton; see `halfstep.ops.explain`.

    Raises `UnknownNameError` for an unknown format, rounding, overflow or backend; `FormatError` for
    an overflow that the format cannot have; `OperandError` for a tensor that cannot be rounded or
    written.

    >>> x = torch.tensor([0.1, 2.5, 500.0, -0.0])
    >>> round_to(x, "e4m3fn").tolist()
    [0.1015625, 2.5, 448.0, -0.0]
    >>> round_to(torch.tensor([300, -129]), "int8", overflow="wrap").tolist()
    [44.0, 127.0]

    Source: IEEE 754-2019 (roundings, overflow, underflow); OCP OFP8 v1.0 (conversion); not checked.
    """
    if is_traced():
        return _traced(
            x, format, rounding, out, generator, overflow, subnormals, random_bits, backend
        )
    parsed = _with(Format.parse(format), overflow, subnormals)
    rounding = Rounding.parse(rounding)
    backend = Backend.parse(backend)
    _check_input(x)
    wants_grad = (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0
    _check(x, parsed, rounding, random_bits, out, wants_grad)
    key = draw_key(generator, random_bits) if rounding is Rounding.STOCHASTIC else _NO_KEY
    if out is not None:
        _round_into(out, x, parsed, rounding, key, backend)
        return out
    arguments = (x, parsed, rounding, key, backend)
    return _StraightThrough.apply(*arguments) if wants_grad else _rounded(*arguments)


def round_into(out: Tensor, x: Tensor, format: Format) -> None:
    """Writes ``x``, rounded to nearest, to ``out``: no checks, no graph, no node of one."""
    _round_into(out, x, format, Rounding.NEAREST, _NO_KEY, Backend.AUTO)


def rounder(format: Format) -> Callable[[Tensor], Tensor]:
    """A function that gives ``round_to(x, format)`` of FP32 and FP64 tensors, without a graph.

    For callers with many small tensors: what depends on the format alone is decided here.
    """
    native_one = native.rounder(format)

    def rounded(x: Tensor) -> Tensor:
        if native_one is not None and _is_plain(x):
            return native_one(x)
        return round_to(x.detach(), format)

    return rounded


def row_rounder(format: Format) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function that gives ``round_to(made + round_to(row, format), format)``, written over ``made``.

    ``made`` (..., N) is FP32 and no one else's, ``row`` (N) is FP32, or None; without a graph.
    """
    native_one = native.row_rounder(format)

    def rounded(made: Tensor, row: Tensor | None) -> Tensor:
        if native_one is not None and _is_plain(made) and (row is None or _is_plain(row)):
            native_one(made, row)
            return made
        if row is not None:
            made.add_(round_to(row.detach(), format))
        return round_to(made, format, out=made)

    return rounded


def _is_plain(x: Tensor) -> bool:
    """True for an FP32 tensor whose numbers lie one after another in memory of its own."""
    return (
        x.dtype is torch.float32
        and type(x) in PLAIN
        and x.is_cpu
        and x.is_contiguous()
        and not (x.is_neg() or is_functorch_wrapped_tensor(x))
    )


def _with(
    format: Format, overflow: Overflow | str | None, subnormals: Subnormals | str | None
) -> Format:
    if overflow is not None:
        format = format.with_overflow(Overflow.parse(overflow))
    if subnormals is not None:
        format = format.with_subnormals(Subnormals.parse(subnormals))
    return format


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        return _rounded(x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0].clone()


def _rounded(x: Tensor, format: Format, rounding: Rounding, key: Key, backend: Backend) -> Tensor:
    out = torch.empty_like(x, dtype=result_dtype(x.dtype, format), requires_grad=False)
    _round_into(out, x, format, rounding, key, backend)
    return out


def _round_into(
    out: Tensor, x: Tensor, format: Format, rounding: Rounding, key: Key, backend: Backend
) -> None:
    if x.dtype is torch.int64 and format.overflow is Overflow.WRAP:
        # the lower bits are what is left, and float64 would lose them
        x = x & (2**format.integer_bits - 1)
    choice = choose("round_to", x.device, backend, asked=format, tensors=(x, out))
    choice.function(out, x, format, rounding, key)


# In a graph; halfstep.ops.custom says how.


def _traced(
    x: Tensor,
    format: Any,
    rounding: Any,
    out: Tensor | None,
    generator: Any,
    overflow: Any,
    subnormals: Any,
    random_bits: int,
    backend: Any,
) -> Tensor:
    rounding = choice_text(rounding)
    seed = seed_for(generator) if rounding == Rounding.STOCHASTIC.value else None
    texts = ["" if it is None else choice_text(it) for it in (overflow, subnormals)]
    arguments = (x, format_text(format), rounding, seed, *texts, random_bits, choice_text(backend))
    if out is None:
        return _node(*arguments)
    _check_out(out, x, torch.is_grad_enabled() and x.requires_grad)
    _writing_node(out, *arguments)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arguments:
    """What the node's plain values mean; the order is that of ``_SCHEMA``."""

    format: Format
    rounding: Rounding
    key: Key
    backend: Backend

    @classmethod
    def parse(
        cls,
        format: str,
        rounding: str,
        seed: Tensor | None,
        overflow: str,
        subnormals: str,
        random_bits: int,
        backend: str,
    ) -> _Arguments:
        return cls(
            format=_with(format_of(format), overflow or None, subnormals or None),
            rounding=Rounding.parse(rounding),
            key=Key.from_seed(0 if seed is None else int(seed), random_bits),
            backend=Backend.parse(backend),
        )


def _eager(x: Tensor, *values: Any) -> Tensor:
    it = _Arguments.parse(*values)
    return _rounded(x, it.format, it.rounding, it.key, it.backend)


def _eager_into(out: Tensor, x: Tensor, *values: Any) -> None:
    it = _Arguments.parse(*values)
    _round_into(out, x, it.format, it.rounding, it.key, it.backend)


def _fake(x: Tensor, format: str, rounding: str, _: Tensor | None, *values: Any) -> Tensor:
    _check_input(x)
    it = _Arguments.parse(format, rounding, None, *values)
    _check(x, it.format, it.rounding, it.key.bits, None, wants_grad=False)
    return torch.empty_like(x, dtype=result_dtype(x.dtype, it.format))


def _fake_into(
    out: Tensor, x: Tensor, format: str, rounding: str, _: Tensor | None, *values: Any
) -> None:
    _check_input(x)
    it = _Arguments.parse(format, rounding, None, *values)
    _check(x, it.format, it.rounding, it.key.bits, out, wants_grad=False)


def _batched(info: Any, in_dims: Any, x: Tensor, *values: Any) -> tuple[Tensor, int]:
    """Every example gets the random bits that it would get alone."""
    x = x.movedim(in_dims[0], 0)
    _, _, seed, *_ = values
    if seed is None:
        return _node(x, *values), 0
    return torch.stack([_node(example, *values) for example in x]), 0


_SCHEMA = (
    "str format, str rounding, Tensor? seed, str overflow, str subnormals, int random_bits, "
    "str backend"
)
_node = operator(
    "round_to",
    f"(Tensor x, {_SCHEMA}) -> Tensor",
    _eager,
    fake=_fake,
    backward=straight_through(8),
    batched=_batched,
)
_writing_node = operator(
    "round_into",
    f"(Tensor(a!) out, Tensor x, {_SCHEMA}) -> ()",
    _eager_into,
    fake=_fake_into,
    mutates=("out",),
)


def _check(
    x: Tensor,
    format: Format,
    rounding: Rounding,
    random_bits: int,
    out: Tensor | None,
    wants_grad: bool,
) -> None:
    if not (isinstance(random_bits, int) and 1 <= random_bits <= ALL_BITS):
        raise OperandError(f"round_to: random_bits={random_bits!r}; allowed: 1 to {ALL_BITS}")
    if format.kind is Kind.BINARY and rounding not in (Rounding.NEAREST, Rounding.STOCHASTIC):
        raise OperandError(
            f"round_to: binary has no rounding {rounding.value!r}; allowed: nearest, stochastic"
        )
    if out is not None:
        _check_out(out, x, wants_grad)
        _check_holds(out.dtype, format, "out")
    else:
        _check_holds(result_dtype(x.dtype, format), format, "x")


def _check_input(x: object) -> None:
    if not isinstance(x, Tensor):
        raise OperandError(f"round_to: x is a {type(x).__name__}; allowed: a torch.Tensor")
    if x.dtype not in CARRIERS and x.dtype not in INTEGERS:
        raise OperandError(
            f"round_to: x is {x.dtype}; allowed: {_names(CARRIERS + INTEGERS)}; convert it first"
        )
    if x.layout is not torch.strided:
        raise OperandError(
            f"round_to: x has layout {x.layout}; allowed: torch.strided; round its values()"
        )


def _check_out(out: object, x: Tensor, wants_grad: bool) -> None:
    if not isinstance(out, Tensor):
        raise OperandError(f"round_to: out is a {type(out).__name__}; allowed: a torch.Tensor")
    if out.dtype not in CARRIERS:
        raise OperandError(f"round_to: out is {out.dtype}; allowed: {_names(CARRIERS)}")
    if out.shape != x.shape or out.device != x.device or out.layout is not torch.strided:
        raise OperandError(
            f"round_to: out is {tuple(out.shape)} on {out.device} ({out.layout}); "
            f"it must be as x: {tuple(x.shape)} on {x.device} (torch.strided)"
        )
    if not out.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)
    ):
        raise OperandError(
            f"round_to: out has stride {out.stride()}: several elements share one place, "
            "as after expand(); pass out.contiguous() or no out"
        )
    if wants_grad or (torch.is_grad_enabled() and out.requires_grad):
        raise OperandError(
            "round_to: out= cannot be differentiated; leave it away, or use torch.no_grad()"
        )


def _check_holds(dtype: torch.dtype, format: Format, operand: str) -> None:
    if not holds(dtype, format):
        fitting = _names(d for d in CARRIERS if holds(d, format))
        raise OperandError(
            f"round_to: {operand} is {dtype}, which does not hold every number of {format}; "
            f"allowed: {fitting}; convert x first, or pass an out= of such a dtype"
        )


def _names(dtypes: Any) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
