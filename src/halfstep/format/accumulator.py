"""`Accumulator`: how the products of a dot product are added, as one frozen value with a text form."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from halfstep.errors import FormatError, UnknownNameError
from halfstep.format.choices import Kind, Rounding
from halfstep.format.number import Format

__all__ = ["Accumulator", "Order", "Products"]


class Order(Enum):
    """In which order the products of one chunk are added."""

    SEQUENTIAL = "sequential"
    """One after the other, onto what is there."""
    PAIRWISE = "pairwise"
    """Neighbours, then sums of neighbours, and so on: a tree of adders."""

    @classmethod
    def parse(cls, given: object) -> Order:
        """The order of that name; an `Order` is returned as it is."""
        try:
            return cls(given)
        except ValueError:
            raise UnknownNameError("order", given, [member.value for member in cls]) from None


class Products(Enum):
    """What an addition is given."""

    EXACT = "exact"
    """The product itself: product and addition are rounded once (a fused multiply-add)."""
    ROUNDED = "rounded"
    """The product rounded to the adder's format: a multiplication, then an addition."""

    @classmethod
    def parse(cls, given: object) -> Products:
        """The member of that name; a `Products` is returned as it is."""
        try:
            return cls(given)
        except ValueError:
            raise UnknownNameError("products", given, [member.value for member in cls]) from None


_COUNTED = re.compile(r"(chunk|split)(\d+)")
_MOST_CHUNK = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulator:
    """How products are added: the adder, its rounding, and the order of the additions.

    The text form names what differs from plain sequential addition, in words joined by ``/``:
    ``fp16``, ``fp16/chunk64/between-fp32``, ``e6m9/stochastic``, ``bf16/products-rounded/pairwise``,
    ``fp16/kahan``, ``bf16/split4``; ``Accumulator.parse(str(a)) == a``. What each does is defined by
    `halfstep.matmul`.

    Raises `FormatError` for fields that contradict each other.

    >>> a = Accumulator.parse("fp16/chunk64/between-fp32")
    >>> a.adder.name, a.chunk, a.between.name, str(a)
    ('fp16', 64, 'fp32', 'fp16/chunk64/between-fp32')
    """

    adder: Format
    """The numbers that sums are kept in."""
    between: Format
    """The numbers that the sums of chunks, and of parts, are added in."""
    rounding: Rounding = Rounding.NEAREST
    """Of the adder; `between`, where it is another format, rounds to nearest."""
    products: Products = Products.EXACT
    order: Order = Order.SEQUENTIAL
    chunk: int = 0
    """Products of one chunk, each chunk starting from zero; 0: all in one."""
    split: int = 1
    """Parts that K is cut into, each added on its own: split-K."""
    compensated: bool = False
    """Kahan's summation: a second number carries what the additions lost."""

    def __post_init__(self) -> None:
        for name, number, least in (("chunk", self.chunk, 0), ("split", self.split, 1)):
            if type(number) is not int or not least <= number <= _MOST_CHUNK:
                raise FormatError(
                    f"accumulator: {name}={number!r}; allowed: a whole number from {least}"
                )
        for name, format in (("adder", self.adder), ("between", self.between)):
            if format.kind is Kind.BINARY or not (format.signed and format.has_zero):
                raise FormatError(
                    f"accumulator: {name}={format}, in which nothing can be added up; "
                    "allowed: signed floating-point and fixed-point formats"
                )
        if self.compensated and self.order is Order.PAIRWISE:
            raise FormatError(
                "accumulator: Kahan's summation is sequential; leave one of them away"
            )

    @classmethod
    def parse(cls, given: object) -> Accumulator:
        """The accumulator that a text means; an `Accumulator` is returned as it is.

        A format (text, torch dtype, or `Format`) means plain sequential addition in it.

        Raises `UnknownNameError` or `FormatError` for a word that is not known.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, Format):
            return cls(adder=given, between=given)
        name, *words = str(given).strip().lower().split("/")
        adder = Format.parse(name)
        fields: dict[str, Any] = {"adder": adder, "between": adder}
        for word in words:
            fields |= _meaning(word)
        return cls(**fields)

    def replace(self, **changes: Any) -> Accumulator:
        """A copy with other values of the fields."""
        return replace(self, **changes)

    def __str__(self) -> str:
        words = [self.adder.name]
        words += [self.rounding.value] if self.rounding is not Rounding.NEAREST else []
        words += ["products-rounded"] if self.products is Products.ROUNDED else []
        words += ["pairwise"] if self.order is Order.PAIRWISE else []
        words += ["kahan"] if self.compensated else []
        words += [f"chunk{self.chunk}"] if self.chunk else []
        words += [f"split{self.split}"] if self.split > 1 else []
        words += [f"between-{self.between}"] if self.between != self.adder else []
        return "/".join(words)


def _meaning(word: str) -> dict[str, Any]:
    if counted := _COUNTED.fullmatch(word):
        return {counted[1]: int(counted[2])}
    if word.startswith("between-"):
        return {"between": Format.parse(word.removeprefix("between-"))}
    if word == "kahan":
        return {"compensated": True}
    if word.startswith("products-"):
        return {"products": Products.parse(word.removeprefix("products-"))}
    if word in {member.value for member in Order}:
        return {"order": Order(word)}
    roundings = {member.value for member in Rounding}
    if word in roundings:
        return {"rounding": Rounding(word)}
    known = [*roundings, "sequential", "pairwise", "kahan", "products-rounded", "chunk64", "split2"]
    raise UnknownNameError("word of an accumulator", word, [*known, "between-fp32"])
