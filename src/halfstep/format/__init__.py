"""What a number is: formats as frozen data, and the exact scalar codec."""

# Stand-in until the real package lands from branch `numbers`, which replaces this file whole.
from __future__ import annotations

from dataclasses import dataclass

from halfstep.errors import UnknownNameError

__all__ = ["Format"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A number format: its name and the bits of its exponent and mantissa."""

    name: str
    exponent_bits: int
    mantissa_bits: int

    @classmethod
    def parse(cls, text: str) -> Format:
        """The format of that name."""
        if text not in _BITS:
            raise UnknownNameError("format", text, _BITS)
        exponent, mantissa = _BITS[text]
        return cls(name=text, exponent_bits=exponent, mantissa_bits=mantissa)

    def __str__(self) -> str:
        return self.name


_BITS = {
    "fp32": (8, 23),
    "tf32": (8, 10),
    "bf16": (8, 7),
    "fp16": (5, 10),
    "e5m2": (5, 2),
    "e4m3fn": (4, 3),
    "e6m9": (6, 9),
}
