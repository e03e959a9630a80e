"""From a name to a format: catalogue, synonyms, families, and suffixes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from halfstep.errors import FormatError, UnknownNameError
from halfstep.format.catalogue import CATALOGUE, SYNONYMS
from halfstep.format.choices import Kind, Overflow, Specials, Subnormals
from halfstep.format.number import Format

__all__ = ["parse_name"]

_FLOAT = re.compile(r"e(\d{1,3})m(\d{1,3})")
_INTEGER = re.compile(r"int(\d{1,3})")
_FIXED = re.compile(r"q(\d{1,3})\.(\d{1,3})")

_OVERFLOWS = tuple(member.value for member in Overflow)
_SUBNORMALS = tuple(member.value for member in Subnormals)

# Names that mean different formats to different people: we ask instead of choosing.
_AMBIGUOUS = MappingProxyType(
    {
        "fp8": ("e4m3fn", "e5m2"),
        "float8": ("e4m3fn", "e5m2"),
        "fp8_e4m3": ("e4m3fn", "e4m3"),
        "fp6": ("e3m2", "e2m3"),
    }
)

# A family member with the numbers of a named format is that format, not a twin of it.
_FLOATS_BY_WIDTH: Mapping[tuple[int, int], Format] = MappingProxyType(
    {
        (f.exponent_bits, f.mantissa_bits): f
        for f in CATALOGUE.values()
        if f.specials is Specials.IEEE
    }
)


@cache
def parse_name(name: str) -> Format:
    """The format that a name means; see `Format.parse`."""
    text = name.strip().lower().removeprefix("torch.")
    stem, *suffixes = text.split(":")
    format = _named(stem)
    for suffix in suffixes:
        if suffix in _OVERFLOWS:
            format = format.with_overflow(Overflow(suffix))
        elif suffix in _SUBNORMALS:
            format = format.with_subnormals(Subnormals(suffix))
        else:
            _refuse_blocks(text)
            raise FormatError(
                f"suffix {suffix!r} in format {text!r}; allowed after a colon: "
                f"{', '.join([*_OVERFLOWS, *_SUBNORMALS])}"
            )
    return format


def _named(name: str) -> Format:
    name = SYNONYMS.get(name, name)
    if name in CATALOGUE:
        return CATALOGUE[name]
    if match := _FLOAT.fullmatch(name):
        return _float(int(match[1]), int(match[2]))
    if match := _INTEGER.fullmatch(name):
        return _fixed(int(match[1]), 0)
    if match := _FIXED.fullmatch(name):
        return _fixed(int(match[1]), int(match[2]))
    _refuse_blocks(name)
    if name in _AMBIGUOUS:
        raise UnknownNameError("format", name, _AMBIGUOUS[name])
    raise UnknownNameError("format", name, [*CATALOGUE, *SYNONYMS, "eXmY", "intN", "qI.F"])


def _refuse_blocks(text: str) -> None:
    # block formats are made of formats: import at the call
    from halfstep.format.blocks import is_block_name

    if is_block_name(text):
        raise FormatError(
            f"{text!r} is a block format, elements with shared scales, and no format of one number: "
            f"say halfstep.quantize_blocks(x, {text!r}) or BlockFormat.parse({text!r})"
        )


def _float(exponent_bits: int, mantissa_bits: int) -> Format:
    named = _FLOATS_BY_WIDTH.get((exponent_bits, mantissa_bits))
    return named or Format(
        name=f"e{exponent_bits}m{mantissa_bits}",
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        # max(): a width of 0 is refused by Format, in its words
        bias=2 ** max(exponent_bits - 1, 0) - 1,
        specials=Specials.IEEE,
        overflow=Overflow.INF,
        source="IEEE 754-2019 with other widths",
    )


def _fixed(integer_bits: int, fraction_bits: int) -> Format:
    name = f"q{integer_bits}.{fraction_bits}" if fraction_bits else f"int{integer_bits}"
    return CATALOGUE.get(name) or Format(
        name=name,
        kind=Kind.FIXED,
        integer_bits=integer_bits,
        mantissa_bits=fraction_bits,
        source="two's complement, saturating; Q notation as ARM's and Gupta et al., "
        "arXiv 1502.02551: the sign is one of the integer bits",
    )
