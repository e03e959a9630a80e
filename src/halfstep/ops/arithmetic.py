"""What dot products of every kind are told: the keywords of the public edge as one frozen value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from halfstep.errors import OperandError
from halfstep.format import Accumulator, Format, Kind, Order, Products, Rounding, Unit
from halfstep.ops.backends import Backend
from halfstep.ops.carriers import CARRIERS, INTEGERS
from halfstep.ops.custom import constant, format_text, seed_for, text_of, value_of
from halfstep.ops.random_bits import Key, draw_key
from halfstep.ops.rounding import round_to
from halfstep.ops.sparsity import Sparse

__all__ = [
    "NO_KEY",
    "Arithmetic",
    "Keywords",
    "arithmetic_of",
    "arithmetic_text",
    "carried",
    "check_operand",
    "check_steps",
    "key_for",
    "key_of_node",
    "next_key",
    "operands_of",
    "rounded",
    "seed_of_node",
]

NO_KEY = Key()
_MOST_BITS = 25  # of a fixed-point number in a float32, sign included
_MOST_STEPS = 2**26  # a stochastic sum has random bits of its own for so many


def _is_integer(format: Format) -> bool:
    return format.kind is Kind.FIXED and format.mantissa_bits == 0 and not format.symmetric


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
        return _of_gradient(self, (self.gradient, self.operands[1]))

    @property
    def of_b(self) -> Arithmetic:
        """That of the product which makes the gradient of b: a, times the one that arrives."""
        return _of_gradient(self, (self.operands[0], self.gradient))

    @property
    def is_plain(self) -> bool:
        """True where any back end may do it, and both operands are dense."""
        return self.backend is Backend.AUTO and self.sparse is Sparse.NONE

    @property
    def is_random(self) -> bool:
        """True where any sum of it, forward or backward, rounds stochastically."""
        return Rounding.STOCHASTIC in (self.forward.rounding, self.backward.rounding)

    @property
    def integers(self) -> str:
        """Which of the operands, "a" and "b", and whether the sum, "+", are in formats of integers."""
        return _integers(*self.operands, self.forward.adder)

    @property
    def accumulator(self) -> Accumulator:
        """The forward one, for these operands. Raises `FormatError` if it cannot multiply them."""
        return _for_operands(self.forward, self.operands)

    def __str__(self) -> str:
        left, right = self.operands
        choices = (self.backend.value, self.sparse.value)
        words = (left, right, self.gradient, *choices, self.forward, self.backward)
        return " ".join(map(str, words))

    @classmethod
    def parse(cls, text: str) -> Arithmetic:
        """The one whose text it is; of formats that have names."""
        left, right, gradient, backend, sparse, forward, backward = text.split(" ", 6)
        return cls(
            forward=Accumulator.parse(forward),
            backward=Accumulator.parse(backward),
            operands=(Format.parse(left), Format.parse(right)),
            gradient=Format.parse(gradient),
            backend=Backend.parse(backend),
            sparse=Sparse.parse(sparse),
        )

    @property
    def text(self) -> str:
        """What stands for it in a graph."""
        return text_of(self, str(self), self.parse)

    @classmethod
    def of_text(cls, text: str) -> Arithmetic:
        """The one that `text` is of. Raises `OperandError` for one of another process' own formats."""
        return _of_text(text)


# By the arguments of a call, or by identity: parsing and checking take longer than a small product.


@cache
def _of_text(text: str) -> Arithmetic:
    return value_of(text, Arithmetic.parse)


@lru_cache(maxsize=1024)
def _of_gradient(it: Arithmetic, operands: tuple[Format, Format]) -> Arithmetic:
    return replace(it, forward=it.backward, operands=operands, sparse=Sparse.NONE)


@lru_cache(maxsize=1024)
def _integers(left: Format, right: Format, adder: Format | Unit) -> str:
    numbers = zip("ab+", (left, right, adder), strict=True)
    return "".join(name for name, it in numbers if isinstance(it, Format) and _is_integer(it))


@lru_cache(maxsize=1024)
def _for_operands(accumulator: Accumulator, operands: tuple[Format, Format]) -> Accumulator:
    return accumulator.of(*operands)


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


def arithmetic_of(
    op: str, *, sparse: Sparse | str | None = None, **given: Unpack[Keywords]
) -> Arithmetic:
    """The arithmetic that the keywords of ``op`` mean.

    Raises `OperandError` for operands that are no pair, `FormatError` for a unit that cannot multiply
    them, and what the parsers of each raise.
    """
    try:
        return _cached(op, sparse, **given)
    except TypeError:  # a list, which has no hash
        return _parsed(op, sparse, given)


def arithmetic_text(op: str, sparse: Sparse | str | None, given: Keywords) -> str:
    """`Arithmetic.text` of what these keywords mean, in a graph."""
    words: dict[str, Any] = dict(given)
    for name, text_of_one in _TEXTS.items():
        value = words.get(name)
        if isinstance(value, tuple | list):
            words[name] = tuple([text_of_one(each) for each in value])
        elif value is not None:
            words[name] = text_of_one(value)
    return _parsed_text(op, sparse, words)


def _accumulator_text(given: Accumulator | Format | Unit | str) -> str:
    return given if isinstance(given, str) else _text_of_accumulator(given)


@constant
def _text_of_accumulator(given: Accumulator | Format | Unit) -> str:
    parsed = Accumulator.parse(given)
    return text_of(parsed, str(parsed), Accumulator.parse)


_TEXTS: dict[str, Callable[[Any], str]] = {
    "operands": format_text,
    "between": format_text,
    "gradient": format_text,
    "accumulate": _accumulator_text,
    "grad_accumulate": _accumulator_text,
}


@constant
def _parsed_text(op: str, sparse: Sparse | str | None, words: dict[str, Any]) -> str:
    given: Any = dict(words)
    for name in _TEXTS:
        parse = Accumulator.parse if "accumulate" in name else Format.parse
        value = words.get(name)
        if isinstance(value, tuple):
            given[name] = tuple(value_of(text, parse) for text in value)
        elif value is not None:
            given[name] = value_of(value, parse)
    return arithmetic_of(op, sparse=sparse, **given).text


@lru_cache(maxsize=1024, typed=True)
def _cached(op: str, sparse: Sparse | str | None, **given: Unpack[Keywords]) -> Arithmetic:
    return _parsed(op, sparse, given)


def _parsed(op: str, sparse: Sparse | str | None, given: Keywords) -> Arithmetic:
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
        sparse=Sparse.parse(sparse),
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
    if not arithmetic.is_random:
        return NO_KEY
    check_steps(op, arithmetic, steps)
    return draw_key(generator)


def check_steps(op: str, arithmetic: Arithmetic, steps: int) -> None:
    """Raises `OperandError` for more products than a stochastic sum has random bits for."""
    if arithmetic.is_random and steps >= _MOST_STEPS:
        raise OperandError(
            f"{op}: K = {steps} with stochastic rounding; allowed: less than {_MOST_STEPS}"
        )


def seed_of_node(text: str, generator: torch.Generator | None) -> Tensor | None:
    """In a graph, the number that a key is made of, where the arithmetic of this text asks for one."""
    return seed_for(generator) if _is_random(text) else None


@constant
def _is_random(text: str) -> bool:
    return Arithmetic.of_text(text).is_random


def key_of_node(seed: Tensor | None, turns: list[int]) -> Key:
    """The key of a node: that of the seed, or none, turned by `next_key` so often."""
    key = NO_KEY if seed is None else Key.from_seed(int(seed))
    for which in turns:
        key = next_key(key, which)
    return key


@constant
def operands_of(text: str) -> str:
    """Of the arithmetic of this text, the formats of the operands, which are sparse, and which are
    integers (`Arithmetic.integers`): in lines.
    """
    it = Arithmetic.of_text(text)
    return "\n".join((*map(format_text, it.operands), it.sparse.value, it.integers))


def next_key(key: Key, which: int) -> Key:
    """A key for another product of the same call; none for none."""
    return key if key == NO_KEY else Key.from_seed((key.low << 32 | key.high) + which)


def rounded(x: Tensor, format: Format | str) -> Tensor:
    """``x`` in the format, in a dtype that holds it; straight-through gradient."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x if str(format) == "fp32" and x.dtype is torch.float32 else round_to(x, format)


def carried(x: Tensor, is_integer: bool) -> Tensor:
    """``x`` in a floating-point dtype, where it is of integers and so is its format.

    The dtype holds it, or of an int64 another number that any format of integers has the same one for.
    """
    if not (is_integer and isinstance(x, Tensor) and x.dtype in INTEGERS):
        return x
    if x.dtype is torch.int64:  # those beyond 2^52 saturate by their sign or wrap by their low bits
        x = x.where((x >= -(2**52)) & (x < 2**52), x.sign() * 2**52 + x % 2**32)
    wide = x.dtype in (torch.int32, torch.int64)
    return x.to(torch.float64 if wide else torch.float32)


def check_operand(op: str, name: str, x: object, *, least: int) -> None:
    """Raises `OperandError` for what is no dense floating-point tensor of ``least`` dimensions."""
    if not isinstance(x, Tensor):
        raise OperandError(f"{op}: {name} is a {type(x).__name__}; allowed: a torch.Tensor")
    if x.dtype not in CARRIERS or x.layout is not torch.strided or x.dim() < least:
        also = ", or integers where its format is intN" if x.dtype in INTEGERS else ""
        raise OperandError(
            f"{op}: {name} is {x.dtype} of shape {tuple(x.shape)} ({x.layout}); allowed: a dense "
            f"float32, float64, float16 or bfloat16 tensor of {least} or more dimensions{also}"
        )
