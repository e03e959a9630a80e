"""`round_to`: the public edge of rounding. Checks and gradient; back ends do the arithmetic."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from halfstep.errors import OperandError
from halfstep.format import Format, Kind, Rounding
from halfstep.ops.backends import Backend, choose
from halfstep.ops.custom import (
    choice_text,
    format_of,
    format_text,
    is_traced,
    operator,
    seed_for,
    straight_through,
)
from halfstep.ops.random_bits import Key, draw_key

__all__ = ["CARRIERS", "round_to"]

CARRIERS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NO_KEY = Key()


def round_to(
    x: Tensor,
    format: Format | str,
    rounding: Rounding | str = "nearest",
    out: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Every element of ``x`` rounded, once, to the nearest number of ``format``, in ``x``'s dtype.

    ``x`` is float32, float64, float16 or bfloat16, of any shape and layout, on any device. The
    result has ``x``'s shape and dtype and is new; with ``out`` (same shape and device, any of the
    four dtypes, may be ``x`` itself or overlap it) it is written there and ``out`` is returned.
    A dtype that cannot hold every number of the format is refused.

    ``rounding``: nearest (ties to even) | stochastic | toward_zero | up | down | away (nearest,
    ties away from zero). Stochastic takes the neighbour farther from zero with probability
    floor(2^32 rest) / 2^32, where rest is the distance to the other one in units of their
    distance: unbiased for float32 and 16-bit normal numbers, and to 2^-32 of a unit elsewhere. Its
    random bits depend on the ``generator``'s seed (torch's default CPU generator where none is
    given) and on the element's index, on nothing else: not on back end, threads or layout.

    - NaN stays NaN, also where the format has none: quiet, sign and payload kept in float32 and
      float64.
    - -0 stays -0, and what rounds to zero from below is -0, in formats that have it; else 0.
    - Overflow becomes what the format's literal says (``Format.overflow``; ``"e4m3fn:nan"`` is
      another): a magnitude that would round beyond the largest number if exponents had no end.
      Directed roundings stop at the largest number. Infinity stays; it saturates where overflow
      does, and is NaN where overflow is and the format has no infinity.
    - Subnormal numbers are exact, whatever the processor's flush-to-zero setting is.
    - binary: -1 below 0, else 1; only nearest and stochastic.
    - e8m0: negative numbers become NaN, zero the smallest number.

    Gradient: straight through, that is, the gradient of the result is passed on to ``x`` unchanged;
    `torch.func` transforms work, too. In `torch.compile` and `torch.export` it is one node, with the
    same results; there a ``generator`` breaks the graph, and torch's default one is used in order.
    ``backend`` is for tests: auto | reference | native | triton; see `halfstep.ops.explain`.

    Raises `UnknownNameError` for an unknown format, rounding or backend; `OperandError` for a
    tensor that cannot be rounded or written.

    >>> x = torch.tensor([0.1, 2.5, 500.0, -0.0])
    >>> round_to(x, "e4m3fn").tolist()
    [0.1015625, 2.5, 448.0, -0.0]

    Source: IEEE 754-2019, sections 4.3 and 7.4; OCP OFP8 v1.0, section 5.2 (conversion).
    """
    if is_traced():
        return _traced(x, format, rounding, out, generator, backend)
    format = Format.parse(format)
    rounding = Rounding.parse(rounding)
    backend = Backend.parse(backend)
    _check_input(x)
    wants_grad = (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0
    _check(x, format, rounding, out, wants_grad)
    key = draw_key(generator) if rounding is Rounding.STOCHASTIC else _NO_KEY
    if out is not None:
        _round_into(out, x, format, rounding, key, backend)
        return out
    arguments = (x, format, rounding, key, backend)
    return _StraightThrough.apply(*arguments) if wants_grad else _rounded(*arguments)


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
    out = torch.empty_like(x, requires_grad=False)
    _round_into(out, x, format, rounding, key, backend)
    return out


def _round_into(
    out: Tensor, x: Tensor, format: Format, rounding: Rounding, key: Key, backend: Backend
) -> None:
    choice = choose("round_to", x.device, backend, asked=format, tensors=(x, out))
    choice.function(out, x, format, rounding, key)


# In a graph; halfstep.ops.custom says how.


def _traced(
    x: Tensor, format: Any, rounding: Any, out: Tensor | None, generator: Any, backend: Any
) -> Tensor:
    rounding = choice_text(rounding)
    seed = seed_for(generator) if rounding == Rounding.STOCHASTIC.value else None
    arguments = (x, format_text(format), rounding, seed, choice_text(backend))
    if out is None:
        return _node(*arguments)
    _check_out(out, x, torch.is_grad_enabled() and x.requires_grad)
    _writing_node(out, *arguments)
    return out


def _parsed(
    format: str, rounding: str, seed: Tensor | None, backend: str
) -> tuple[Format, Rounding, Key, Backend]:
    key = _NO_KEY if seed is None else Key.from_seed(int(seed))
    return format_of(format), Rounding.parse(rounding), key, Backend.parse(backend)


def _eager(x: Tensor, *texts: Any) -> Tensor:
    return _rounded(x, *_parsed(*texts))


def _eager_into(out: Tensor, x: Tensor, *texts: Any) -> None:
    _round_into(out, x, *_parsed(*texts))


def _fake(x: Tensor, format: str, rounding: str, seed: Tensor | None, backend: str) -> Tensor:
    Backend.parse(backend)
    _check_input(x)
    _check(x, format_of(format), Rounding.parse(rounding), None, wants_grad=False)
    return torch.empty_like(x)


def _fake_into(
    out: Tensor, x: Tensor, format: str, rounding: str, seed: Tensor | None, backend: str
) -> None:
    Backend.parse(backend)
    _check_input(x)
    _check(x, format_of(format), Rounding.parse(rounding), out, wants_grad=False)


def _batched(info: Any, in_dims: Any, x: Tensor, *texts: Any) -> tuple[Tensor, int]:
    """Every example gets the random bits that it would get alone."""
    x = x.movedim(in_dims[0], 0)
    if texts[2] is None:
        return _node(x, *texts), 0
    return torch.stack([_node(example, *texts) for example in x]), 0


_TEXTS = "str format, str rounding, Tensor? seed, str backend"
_node = operator(
    "round_to",
    f"(Tensor x, {_TEXTS}) -> Tensor",
    _eager,
    fake=_fake,
    backward=straight_through(5),
    batched=_batched,
)
_writing_node = operator(
    "round_into",
    f"(Tensor(a!) out, Tensor x, {_TEXTS}) -> ()",
    _eager_into,
    fake=_fake_into,
    mutates=("out",),
)


def _check(
    x: Tensor, format: Format, rounding: Rounding, out: Tensor | None, wants_grad: bool
) -> None:
    if format.kind is Kind.BINARY and rounding not in (Rounding.NEAREST, Rounding.STOCHASTIC):
        raise OperandError(
            f"round_to: binary has no rounding {rounding.value!r}; allowed: nearest, stochastic"
        )
    if out is not None:
        _check_out(out, x, wants_grad)
        _check_holds(out.dtype, format, "out")
    else:
        _check_holds(x.dtype, format, "x")


def _check_input(x: object) -> None:
    if not isinstance(x, Tensor):
        raise OperandError(f"round_to: x is a {type(x).__name__}; allowed: a torch.Tensor")
    if x.dtype not in CARRIERS:
        raise OperandError(
            f"round_to: x is {x.dtype}; allowed: {_names(CARRIERS)}; convert it first"
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
    if not _holds(dtype, format):
        fitting = _names(d for d in CARRIERS if _holds(d, format))
        raise OperandError(
            f"round_to: {operand} is {dtype}, which does not hold every number of {format}; "
            f"allowed: {fitting}; convert x first, or pass an out= of such a dtype"
        )


@cache
def _holds(dtype: torch.dtype, format: Format) -> bool:
    """True if every number of the format is one of the dtype."""
    limits = torch.finfo(dtype)
    digits = format.precision if format.kind is Kind.FLOAT else format.bits - 1
    return (
        digits <= 1 - math.log2(limits.eps)
        and max(format.max, -format.lowest) <= limits.max
        and format.quantum_exponent >= math.log2(limits.smallest_normal) + math.log2(limits.eps)
    )


def _names(dtypes: Any) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
