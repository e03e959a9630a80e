"""The closed sets that a format and a rounding are chosen from."""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType

from halfstep.errors import UnknownNameError

__all__ = ["Kind", "Overflow", "Rounding", "Specials", "Subnormals"]


class Kind(Enum):
    """How the bits of a number make its value."""

    FLOAT = "floating-point"
    """(-1)^sign * 1.mantissa * 2^(exponent - bias), gradual underflow below."""
    FIXED = "fixed-point"
    """A two's complement integer times a power of two."""
    BINARY = "binary"
    """One bit: -1 or +1."""


class Specials(Enum):
    """Which codes of a float are no finite number."""

    IEEE = "ieee"
    """The top exponent: infinity where the mantissa is 0, else NaN."""
    NAN_ONLY = "nan_only"
    """Only the code whose exponent and mantissa are all ones: NaN. There is no infinity."""
    NONE = "none"
    """None: every code is a finite number."""
    EXTENDED = "extended"
    """-0's code is NaN, and the one of the largest magnitude is infinity (IEEE P3109)."""
    FINITE = "finite"
    """-0's code is NaN; there is no infinity (IEEE P3109; "fnuz")."""


class Overflow(Enum):
    """What a number becomes that rounds beyond the largest one."""

    INF = "inf"
    SATURATE = "saturate"
    """The largest number, or the most negative one; infinity too."""
    NAN = "nan"
    WRAP = "wrap"
    """What is left of it modulo 2^bits quanta, as in two's complement arithmetic; infinity is NaN."""

    @classmethod
    def parse(cls, given: object) -> Overflow:
        """The overflow of that name; an `Overflow` is returned as it is."""
        if isinstance(given, cls):
            return given
        try:
            return cls(given)
        except ValueError:
            raise UnknownNameError("overflow", given, [member.value for member in cls]) from None


class Subnormals(Enum):
    """What becomes of numbers between zero and the smallest normal one."""

    KEEP = "keep"
    """They are numbers of the format: gradual underflow."""
    FLUSH = "flush"
    """They are zero, with their sign; see `halfstep.format.round_number`."""

    @classmethod
    def parse(cls, given: object) -> Subnormals:
        """The member of that name; a `Subnormals` is returned as it is."""
        if isinstance(given, cls):
            return given
        try:
            return cls(given)
        except ValueError:
            raise UnknownNameError("subnormals", given, [member.value for member in cls]) from None


class Rounding(Enum):
    """Which neighbour on the grid a number between two becomes."""

    NEAREST = "nearest"
    """The nearer one; at a tie the one whose last digit is even."""
    STOCHASTIC = "stochastic"
    """The farther from zero with a probability equal to the distance from the nearer to zero."""
    TOWARD_ZERO = "toward_zero"
    UP = "up"
    """Toward +infinity."""
    DOWN = "down"
    """Toward -infinity."""
    AWAY = "away"
    """The nearer one; at a tie the one farther from zero."""
    TO_ODD = "to_odd"
    """The one whose last digit is odd: a later rounding, to two digits less, is then as if the only one
    (S. Boldo, G. Melquiond, IEEE Trans. Computers, 2008; not checked)."""

    @classmethod
    def parse(cls, given: object) -> Rounding:
        """The rounding of that name; a `Rounding` is returned as it is.

        Nearest is known by its ties, too: ``nearest_even`` and ``nearest_away``. Words may be joined by
        ``-``. Raises `UnknownNameError` for any other value.

        >>> Rounding.parse("toward-zero"), Rounding.parse("nearest_away")
        (<Rounding.TOWARD_ZERO: 'toward_zero'>, <Rounding.AWAY: 'away'>)
        """
        if isinstance(given, cls):
            return given
        name = str(given).replace("-", "_")
        try:
            return cls(_ROUNDING_SYNONYMS.get(name, name))
        except ValueError:
            known = [member.value for member in cls]
            raise UnknownNameError("rounding", given, known) from None

    def magnitude_grows(self, negative: bool) -> bool:
        """True if this rounding overflows; else it stops at the largest (as in IEEE 754)."""
        if self in (Rounding.TOWARD_ZERO, Rounding.TO_ODD):
            return False
        if self is Rounding.UP:
            return not negative
        if self is Rounding.DOWN:
            return negative
        return True


_ROUNDING_SYNONYMS = MappingProxyType({"nearest_even": "nearest", "nearest_away": "away"})
