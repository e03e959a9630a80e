"""What dot products of every kind are told: the keywords of the public edge as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from halfstep.errors import OperandError
from halfstep.format import Accumulator, Format, Kind, Order, Products, Rounding, Unit
from halfstep.ops.backends import Backend
from halfstep.ops.carriers import CARRIERS
from halfstep.ops.random_bits import Key, draw_key
from halfstep.ops.rounding import round_to
from halfstep.ops.sparsity import Sparse

__all__ = [
    "INTEGERS",
    "NO_KEY",
    "Arithmetic",
    "Keywords",
    "arithmetic_of",
    "carried",
    "check_operand",
    "is_integer",
    "key_for",
    "next_key",
    "rounded",
]

NO_KEY = Key()
_MOST_BITS = 25  # of a fixed-point number in a float32, sign included
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)
_MOST_STEPS = 2**26  # a stochastic sum has random bits of its own for so many


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How a product of operands that are rounded already is added, forward and backward."""

    forward: Accumulator
    backward: Accumulator
    operands: tuple[Format, Format]
    """What they were rounded to; a unit must know."""
    gradient: Format
    """What the gradient that arrives is rounded to."""
    backend: Backend = Backend.AUTO
    sparse: Sparse = Sparse.NONE
    """Which operand of the forward is 2:4 sparse and pruned already; the backward's are dense."""

    @property
    def of_a(self) -> Arithmetic:
        """That of the product which makes the gradient of a: the one that arrives, times b."""
        operands = (self.gradient, self.operands[1])
        return replace(self, forward=self.backward, operands=operands, sparse=Sparse.NONE)

    @property
    def of_b(self) -> Arithmetic:
        """That of the product which makes the gradient of b: a, times the one that arrives."""
        operands = (self.operands[0], self.gradient)
        return replace(self, forward=self.backward, operands=operands, sparse=Sparse.NONE)

    @property
    def is_plain(self) -> bool:
        """True where any back end may do it, and both operands are dense."""
        return self.backend is Backend.AUTO and self.sparse is Sparse.NONE

    @property
    def accumulator(self) -> Accumulator:
        """The forward one, for these operands. Raises `FormatError` if it cannot multiply them."""
        return self.forward.of(*self.operands)


class Keywords(TypedDict, total=False):
    """The keywords that say in which arithmetic a dot product is; see `halfstep.matmul` for each."""

    operands: Format | str | tuple[Format | str, Format | str]
    accumulate: Accumulator | Format | Unit | str
    order: Order | str | None
    chunk: int | None
    between: Format | str | None
    split: int | None
    rounding: Rounding | str | None
    products: Products | str | None
    compensated: bool | None
    gradient: Format | str | None
    grad_accumulate: Accumulator | Format | Unit | str | None
    backend: Backend | str


def arithmetic_of(op: str, **given: Unpack[Keywords]) -> Arithmetic:
    """The arithmetic that the keywords of ``op`` mean.

    Raises `OperandError` for operands that are no pair, `FormatError` for a unit that cannot multiply
    them, and what the parsers of each raise.
    """
    left, right = _formats_of(op, given.get("operands", "fp16"))
    order, between = given.get("order"), given.get("between")
    rounding, products = given.get("rounding"), given.get("products")
    forward = Accumulator.parse(given.get("accumulate", "fp16")).replace(
        **_without_none(
            order=order and Order.parse(order),
            chunk=given.get("chunk"),
            between=between and Format.parse(between),
            split=given.get("split"),
            rounding=rounding and Rounding.parse(rounding),
            products=products and Products.parse(products),
            compensated=given.get("compensated"),
        )
    )
    gradient, backward = given.get("gradient"), given.get("grad_accumulate")
    arithmetic = Arithmetic(
        forward=forward,
        backward=forward if backward is None else Accumulator.parse(backward),
        operands=(left, right),
        gradient=left if gradient is None else Format.parse(gradient),
        backend=Backend.parse(given.get("backend", Backend.AUTO)),
    )
    for format in (left, right):
        if format.kind is Kind.FIXED and format.bits > _MOST_BITS:
            raise OperandError(
                f"{op}: operands={format}, whose numbers float32 does not hold; "
                f"allowed: fixed-point formats of at most {_MOST_BITS} bits"
            )
    for each in (arithmetic, arithmetic.of_a, arithmetic.of_b):
        each.accumulator  # noqa: B018 - raises
    return arithmetic


def _without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _formats_of(op: str, operands: Any) -> tuple[Format, Format]:
    """The formats of the two operands, from one or a pair."""
    if isinstance(operands, tuple | list):
        if len(operands) != 2:
            raise OperandError(
                f"{op}: operands={operands!r}; allowed: a format, or a pair of formats"
            )
        return Format.parse(operands[0]), Format.parse(operands[1])
    format = Format.parse(operands)
    return format, format


def key_for(op: str, arithmetic: Arithmetic, steps: int, generator: torch.Generator | None) -> Key:
    """A key drawn for sums of so many products, where any of them rounds stochastically.

    Raises `OperandError` for more products than a sum has random bits for.
    """
    if Rounding.STOCHASTIC not in (arithmetic.forward.rounding, arithmetic.backward.rounding):
        return NO_KEY
    if steps >= _MOST_STEPS:
        raise OperandError(
            f"{op}: K = {steps} with stochastic rounding; allowed: less than {_MOST_STEPS}"
        )
    return draw_key(generator)


def next_key(key: Key, which: int) -> Key:
    """A key for another product of the same call; none for none."""
    return key if key == NO_KEY else Key.from_seed((key.low << 32 | key.high) + which)


def rounded(x: Tensor, format: Format) -> Tensor:
    """``x`` in the format, in a dtype that holds it; straight-through gradient."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x if format.name == "fp32" and x.dtype is torch.float32 else round_to(x, format)


def is_integer(format: Format) -> bool:
    """True for ``intN``."""
    return format.kind is Kind.FIXED and format.mantissa_bits == 0 and not format.symmetric


def carried(x: Tensor, format: Format) -> Tensor:
    """``x`` in a floating-point dtype that holds it, where it is of integers and so is the format."""
    if isinstance(x, Tensor) and x.dtype in INTEGERS and is_integer(format):
        return x.to(torch.float64 if x.dtype is torch.int32 else torch.float32)
    return x


def check_operand(op: str, name: str, x: object, *, least: int) -> None:
    """Raises `OperandError` for what is no dense floating-point tensor of ``least`` dimensions."""
    if not isinstance(x, Tensor):
        raise OperandError(f"{op}: {name} is a {type(x).__name__}; allowed: a torch.Tensor")
    if x.dtype not in CARRIERS or x.layout is not torch.strided or x.dim() < least:
        raise OperandError(
            f"{op}: {name} is {x.dtype} of shape {tuple(x.shape)} ({x.layout}); allowed: a dense "
            f"float32, float64, float16 or bfloat16 tensor of {least} or more dimensions"
        )
