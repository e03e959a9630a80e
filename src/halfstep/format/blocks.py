"""Block formats: narrow elements that share a scale. What they are, as data; ops.blocks computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from types import MappingProxyType

from halfstep.errors import FormatError, UnknownNameError
from halfstep.format.choices import Kind, Overflow
from halfstep.format.number import Format

__all__ = ["BlockFormat", "ScaleRule", "block_formats", "is_block_name"]

WHOLE = 0
"""An extent of a block: all there is along that axis."""


class ScaleRule(Enum):
    """How the scale of a block follows from amax, the largest magnitude in it.

    E is the exponent of the largest power of two that is an element (8 for e4m3fn), M the largest
    element. All but the last give powers of two.
    """

    FLOOR = "floor"
    """2^(floor(log2 amax) - E). The largest elements may saturate. OCP MX v1.0."""
    CEIL = "ceil"
    """2^(ceil(log2 amax) - E). Nothing saturates; the top of the elements' range stays empty."""
    EVEN = "even"
    """FLOOR of amax rounded to the element's mantissa bits, so that less saturates."""
    RCEIL = "rceil"
    """2^ceil(log2(amax / M)): the smallest one at which nothing saturates (cuBLAS, Blackwell)."""
    AMAX = "amax"
    """amax / M, rounded to the scale's format: the largest element is M."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """A block format: its elements, which elements share a scale, and how that scale is found.

    ``str(format)`` is its name, and ``BlockFormat.parse(str(format)) == format``. Elements saturate.

    Raises `FormatError` for fields that contradict each other.

    >>> f = BlockFormat.parse("mxfp4")
    >>> f.element.name, f.columns, f.scale.name, f.rule.value, f.bits_per_element
    ('e2m1', 32, 'e8m0', 'floor', 4.25)
    """

    name: str
    element: Format
    rows: int = 1
    """How many a block spans of the last axis that is not ``dim``; 0: the whole tensor."""
    columns: int = WHOLE
    """How many elements a block spans along ``dim``; 0: all of them."""
    scale: Format
    rule: ScaleRule
    has_tensor_scale: bool = False
    """True where one FP32 number scales the scales (nvfp4), so that their largest is the format's."""
    source: str = ""

    def __post_init__(self) -> None:
        powers = self.scale.mantissa_bits == 0
        problem = ""
        if not (self.element.signed and self.element.max > 0):
            problem = f"elements {self.element}: they must have a sign and a number above 0"
        elif self.element.precision > 24 or (
            self.element.precision == 0 and self.element.bits > 25
        ):
            problem = f"elements {self.element}: more digits than FP32 has"
        elif self.element.overflow is not Overflow.SATURATE:
            problem = f"elements {self.element} that overflow; the elements of a block saturate"
        elif self.rows < 0 or self.columns < 0 or (self.rows == WHOLE and self.columns != WHOLE):
            problem = f"blocks of {self.rows} x {self.columns}; allowed: 1 x 1 and larger"
        elif powers is (self.rule is ScaleRule.AMAX):
            problem = f"rule {self.rule.value} with scales in {self.scale}"
            problem += "; amax is for scales with a mantissa, the others for powers of two"
        elif self.has_tensor_scale and powers:
            problem = f"a second scale above scales in {self.scale}, which need none"
        if problem:
            raise FormatError(f"{self.name}: {problem}")

    @classmethod
    def parse(cls, given: object) -> BlockFormat:
        """The block format of that name; a `BlockFormat` is returned as it is.

        A name is one of the catalogue (`block_formats`), or ``element@block``, where the block is
        ``tensor``, ``row`` (all along ``dim``) or ``RxC`` (a tile of C along ``dim`` and R along
        the last other axis), with FP32 scales by amax. A tile of a block format of the catalogue keeps its
        scales (``nvfp4@16x16``). After a colon come the rule of the scale
        (``mxfp4:rceil``; ``e4m3fn@1x128:ceil``, whose scales then are e8m0) and ``symmetric``
        (integers that leave their most negative code unused).

        Raises `UnknownNameError` for a name that is none of these, `FormatError` for a block format
        that cannot be.

        >>> BlockFormat.parse("e4m3fn@128x128").scale.name, str(BlockFormat.parse("mxint8:ceil"))
        ('fp32', 'mxint8:ceil')
        """
        if isinstance(given, cls):
            return given
        base, *words = str(given).strip().lower().split(":")
        found = _named(base)
        for word in words:
            found = _modified(found, word)
        return found

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def bits_per_element(self) -> float:
        """Bits of one element and of its share of the scale, in a full block; of a whole row or
        tensor, of the element alone."""
        return self.element.bits + self.scale.bits / (self.rows * self.columns or float("inf"))

    @property
    def digits(self) -> int:
        """Binary places after the leading one that the largest elements have."""
        if self.element.kind is Kind.FLOAT:
            return self.element.mantissa_bits
        return max(self.element.bits - 2, 0)

    @property
    def smallest_scale(self) -> float:
        """The least scale, which blocks of zeros have: the smallest positive number of its format.

        Of fp32 the smallest normal one, whose reciprocal is finite.
        """
        normal = self.scale.smallest_normal
        return normal if self.scale.bits == 32 else self.scale.smallest

    @property
    def largest(self) -> float:
        """The largest element at the largest block scale; a tensor scale comes on top."""
        return self.element.max * self.scale.max

    def extents(self, dimensions: int, dim: int) -> tuple[tuple[int, int], ...]:
        """(axis, how many a block spans of it) for each axis along which blocks are longer than 1.

        ``dim`` is counted from 0. A tile of several rows lies along the last axis that is not
        ``dim``; where there is none it is as many elements wide and one high.
        """
        if self.rows == WHOLE:
            return tuple((axis, WHOLE) for axis in range(dimensions))
        others = [axis for axis in range(dimensions) if axis != dim]
        if self.rows == 1 or not others:
            return ((dim, self.columns),)
        return ((dim, self.columns), (others[-1], self.rows))


_MX = "OCP Microscaling Formats (MX) v1.0"


def _mx(name: str, element: str) -> BlockFormat:
    return BlockFormat(
        name=name,
        element=Format.parse(element),
        columns=32,
        scale=Format.parse("e8m0"),
        rule=ScaleRule.FLOOR,
        source=_MX,
    )


_LITERALS = (
    _mx("mxfp8_e4m3", "e4m3fn"),
    _mx("mxfp8_e5m2", "e5m2:saturate"),
    _mx("mxfp6_e3m2", "e3m2"),
    _mx("mxfp6_e2m3", "e2m3"),
    _mx("mxfp4", "e2m1"),
    _mx("mxint8", "q2.6"),
    BlockFormat(
        name="nvfp4",
        element=Format.parse("e2m1"),
        columns=16,
        scale=Format.parse("e4m3fn"),
        rule=ScaleRule.AMAX,
        has_tensor_scale=True,
        source="NVIDIA, Pretraining Large Language Models with NVFP4, arXiv 2509.25149, "
        "scales in OCP E4M3 (our e4m3fn) over one FP32 scale a tensor",
    ),
)

_CATALOGUE: Mapping[str, BlockFormat] = MappingProxyType({f.name: f for f in _LITERALS})
_SYNONYMS = MappingProxyType(
    {
        "mxfp8_e4m3fn": "mxfp8_e4m3",
        "mxfp4_e2m1": "mxfp4",
        "nvfp4_e2m1": "nvfp4",
    }
)
_TILE = re.compile(r"(\d{1,6})x(\d{1,6})")
_SYMMETRIC = "symmetric"


def block_formats() -> Mapping[str, BlockFormat]:
    """Every block format that has a name, by name; ``element@block`` makes others.

    The scalar ones are `halfstep.formats`.

    >>> list(block_formats())
    ['mxfp8_e4m3', 'mxfp8_e5m2', 'mxfp6_e3m2', 'mxfp6_e2m3', 'mxfp4', 'mxint8', 'nvfp4']
    """
    return _CATALOGUE


def is_block_name(text: str) -> bool:
    """True for a name that says a block format, be it one that exists or not."""
    base = text.partition(":")[0]
    return "@" in base or base in _CATALOGUE or base in _SYNONYMS


@lru_cache(maxsize=1024)
def _named(base: str) -> BlockFormat:
    base = _SYNONYMS.get(base, base)
    if base in _CATALOGUE:
        return _CATALOGUE[base]
    element, at, block = base.partition("@")
    if not at:
        families = [f"e4m3fn@{block}" for block in ("tensor", "row", "1x128", "128x128")]
        raise UnknownNameError("block format", base, [*_CATALOGUE, *_SYNONYMS, *families])
    if match := _TILE.fullmatch(block):
        rows, columns = int(match[1]), int(match[2])
        if not (rows and columns):
            raise FormatError(f"{base}: blocks of {block}; allowed: 1x1 and larger")
    elif block in ("tensor", "row"):
        rows, columns = (WHOLE if block == "tensor" else 1), WHOLE
    else:
        raise UnknownNameError("block", block, ["tensor", "row", "1x32", "1x128", "128x128"])
    if element in _CATALOGUE and rows * columns:
        return replace(_CATALOGUE[element], name=base, rows=rows, columns=columns)
    number = Format.parse(element)
    return BlockFormat(
        name=f"{number}@{block}",
        element=number.with_overflow(Overflow.SATURATE),
        rows=rows,
        columns=columns,
        scale=Format.parse("fp32"),
        rule=ScaleRule.AMAX,
        source="the largest magnitude of each block becomes the largest element",
    )


def _modified(format: BlockFormat, word: str) -> BlockFormat:
    if word == _SYMMETRIC:
        if format.element.kind is not Kind.FIXED or format.element.symmetric:
            raise FormatError(f"{format}: only integers that are not yet can be made symmetric")
        element = replace(format.element, name=f"{format.element}:{word}", symmetric=True)
        return replace(format, name=f"{format}:{word}", element=element)
    try:
        rule = ScaleRule(word)
    except ValueError:
        known = [_SYMMETRIC, *(member.value for member in ScaleRule)]
        raise UnknownNameError("rule for the scale", word, known) from None
    if rule is format.rule:
        return format
    if format.rule is not _named(format.name.partition(":")[0]).rule:
        raise FormatError(f"{format}:{word}: two rules for one scale")
    base, _, rest = format.name.partition(":")
    is_family = "@" in base
    return replace(
        format,
        name=":".join(part for part in (base, rule.value, rest) if part),
        rule=rule,
        scale=Format.parse("e8m0") if is_family else format.scale,
    )
