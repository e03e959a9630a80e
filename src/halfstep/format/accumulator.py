"""`Accumulator`: how the products of a dot product are added, as one frozen value with a text form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from halfstep.errors import FormatError, UnknownNameError
from halfstep.format.catalogue import CATALOGUE, SYNONYMS
from halfstep.format.choices import Kind, Rounding
from halfstep.format.number import Format
from halfstep.format.units import UNIT_SYNONYMS, UNITS, Unit

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

    The adder is a number format, or the matrix `Unit` of a chip, which has an order and a rounding
    of its own: it goes with chunks, parts and `between` only, which is fp32 if not given.

    The text form names what differs from plain sequential addition, in words joined by ``/``:
    ``fp16``, ``fp16/chunk64/between-fp32``, ``e6m9/stochastic``, ``bf16/products-rounded/pairwise``,
    ``fp16/kahan``, ``bf16/split4``, ``v100``, ``v100/fp16``, ``h100/chunk128``;
    ``Accumulator.parse(str(a)) == a``. What each does is defined by `halfstep.matmul`.

    Raises `FormatError` for fields that contradict each other.

    >>> a = Accumulator.parse("fp16/chunk64/between-fp32")
    >>> a.adder.name, a.chunk, a.between.name, str(a)
    ('fp16', 64, 'fp32', 'fp16/chunk64/between-fp32')
    """

    adder: Format | Unit
    """The numbers that sums are kept in, or the unit that adds."""
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
    operands: tuple[Format, ...] = field(default=(), compare=False, repr=False)
    """What it multiplies, once that is known (see `of`); no part of its value."""

    def __post_init__(self) -> None:
        for name, number, least in (("chunk", self.chunk, 0), ("split", self.split, 1)):
            if type(number) is not int or not least <= number <= _MOST_CHUNK:
                raise FormatError(
                    f"accumulator: {name}={number!r}; allowed: a whole number from {least}"
                )
        if isinstance(self.adder, Unit):
            self._check_unit(self.adder)
        for name, format in (("adder", self.adder), ("between", self.between)):
            if isinstance(format, Unit):
                continue
            if format.kind is Kind.BINARY or not (format.signed and format.has_zero):
                raise FormatError(
                    f"accumulator: {name}={format}, in which nothing can be added up; "
                    "allowed: signed floating-point and fixed-point formats"
                )
        if self.compensated and self.order is Order.PAIRWISE:
            raise FormatError(
                "accumulator: Kahan's summation is sequential; leave one of them away"
            )

    def __hash__(self) -> int:
        # of all fields it would cost microseconds at every cached call
        return hash((self.adder.name, self.chunk, self.split, self.compensated))

    def _check_unit(self, unit: Unit) -> None:
        own = {
            "rounding": self.rounding is Rounding.NEAREST,
            "products": self.products is Products.EXACT,
            "order": self.order is Order.SEQUENTIAL,
            "compensated": not self.compensated,
        }
        for name, plain in own.items():
            if not plain:
                raise FormatError(
                    f"accumulator: {name} with the unit {unit}, which has its own; "
                    "allowed: chunk, between, split"
                )

    @property
    def format(self) -> Format:
        """The adder of an accumulator that is no unit. Raises `FormatError` for a unit."""
        if isinstance(self.adder, Unit):
            raise FormatError(f"accumulator: {self.adder} is a unit; wanted: a number format")
        return self.adder

    @property
    def start(self) -> Format:
        """What ``initial`` is rounded to where there are no chunks and parts."""
        return CATALOGUE[self.adder.result] if isinstance(self.adder, Unit) else self.adder

    def of(self, left: Format, right: Format) -> Accumulator:
        """This accumulator for products of these two formats, which a unit must know.

        One that knows its operands already keeps them. Raises `FormatError` where the unit does not
        multiply them.
        """
        if self.operands:
            return self
        if isinstance(self.adder, Unit):
            self.adder.datapath(left, right)
        return replace(self, operands=(left, right))

    @classmethod
    def parse(cls, given: object) -> Accumulator:
        """The accumulator that a text means; an `Accumulator` is returned as it is.

        A format (text, torch dtype, or `Format`) means plain sequential addition in it; a `Unit` or
        its name what it does.

        Raises `UnknownNameError` or `FormatError` for a word that is not known.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, Format | Unit):
            return cls(adder=given, between=_between(given))
        name, *words = str(given).strip().lower().split("/")
        if words and f"{UNIT_SYNONYMS.get(name, name)}/{words[0]}" in UNITS:  # one of two results
            name = f"{name}/{words.pop(0)}"
        adder = _adder(name)
        fields: dict[str, Any] = {"adder": adder, "between": _between(adder)}
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
        words += [f"between-{self.between}"] if self.between != _between(self.adder) else []
        return "/".join(words)


def _adder(name: str) -> Format | Unit:
    if name.partition("/")[0] in {*UNITS, *UNIT_SYNONYMS}:
        return Unit.parse(name)
    try:
        return Format.parse(name)
    except UnknownNameError:
        known = [*CATALOGUE, *SYNONYMS, "eXmY", "intN", "qI.F", *UNITS, *UNIT_SYNONYMS]
        raise UnknownNameError("format or unit", name, known) from None


def _between(adder: Format | Unit) -> Format:
    """What sums of chunks and parts are added in where nothing is said."""
    return CATALOGUE["fp32"] if isinstance(adder, Unit) else adder


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
