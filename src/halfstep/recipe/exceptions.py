"""Which dot products of a recipe keep the store format: data, not names in the code."""

from __future__ import annotations

import re
from dataclasses import dataclass

from halfstep.errors import RecipeError

__all__ = ["NOTHING_KEPT", "Keep"]

_WORD = re.compile(r"(first|last)(\d*)(%?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Dot products that read operands in the store format, where the others round them by role.

    Layers are modules that own a weight of two or more axes, in the order of ``modules()``, without
    embeddings, which are look-ups. The text form joins its words with ``+``: ``first``, ``last``,
    ``first2``, ``last15%`` (of the layers, rounded up), ``products`` (those of two activations: the two of
    attention), or ``none``; ``Keep.parse(str(keep)) == keep``.

    Raises `RecipeError` for numbers below 0 or a share above 100 %.

    >>> keep = Keep.parse("products+last15%")
    >>> keep.products, keep.layers(40)
    (True, frozenset({34, 35, 36, 37, 38, 39}))
    >>> str(keep), str(Keep())
    ('products+last15%', 'none')
    """

    first: int = 0
    """Layers at the beginning."""
    last: int = 0
    """Layers at the end."""
    last_percent: int = 0
    """Share of the layers, at the end."""
    products: bool = False
    """Products of two activations."""

    def __post_init__(self) -> None:
        for name in ("first", "last", "last_percent"):
            value = getattr(self, name)
            if type(value) is not int or value < 0 or (name == "last_percent" and value > 100):
                raise RecipeError(
                    f"keep: {name}={value!r}; allowed: whole numbers from 0, % to 100"
                )

    def layers(self, count: int) -> frozenset[int]:
        """Which of ``count`` layers are kept, by index from 0."""
        last = max(self.last, -(-count * self.last_percent // 100))
        return frozenset({*range(min(self.first, count)), *range(max(count - last, 0), count)})

    @classmethod
    def parse(cls, given: object) -> Keep:
        """What a text means; a `Keep` is returned as it is.

        Raises `RecipeError` for a word that is not known.
        """
        if isinstance(given, cls):
            return given
        values: dict[str, int] = {}
        text = str(given).strip().lower()
        for word in [] if text == "none" else text.split("+"):
            match = _WORD.fullmatch(word.strip())
            if word.strip() == "products":
                values["products"] = True
            elif match is None or (match[3] and match[1] == "first"):
                raise RecipeError(
                    f"keep={given}: {word!r}; allowed, joined by +: products, first, first2, last, last2, "
                    "last15%, or none"
                )
            else:
                values[match[1] + ("_percent" if match[3] else "")] = int(match[2] or 1)
        return cls(**values)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        words = ["products"] if self.products else []
        for name, count in (("first", self.first), ("last", self.last)):
            if count:
                words.append(name if count == 1 else f"{name}{count}")
        if self.last_percent:
            words.append(f"last{self.last_percent}%")
        return "+".join(words) or "none"


NOTHING_KEPT = Keep()
