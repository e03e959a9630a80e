"""Operations in no list that were met, and their naming: once, at the end."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterable
from enum import Enum

from halfstep.switching.plan import Executor, Plan, PlanRow

__all__ = ["Handling", "Met", "described"]


class Handling(Enum):
    """What was done with an operation that no list knows."""

    WIDE = "computed in FP32"
    GIVEN = (
        "computed in the dtype that it was given (it takes no FP32, or writes into its operands)"
    )
    PLAIN = "computed in 16 bits, as all of a plain 16-bit program"


_named: set[str] = set()
_unnamed: dict[str, Handling] = {}


class Met:
    """What one switch has met: operation -> what was done with it."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: dict[str, Handling] = {}

    def note(self, operation: str, handling: Handling) -> None:
        """Remember that ``operation`` was called; of several handlings the least careful counts."""
        self._add(operation, handling)
        if operation not in _named:
            _unnamed[operation] = handling

    def _add(self, operation: str, handling: Handling) -> None:
        if self.found.get(operation, Handling.WIDE) is Handling.WIDE:
            self.found[operation] = handling

    def name(self) -> None:
        """Name those that were not named before in a warning."""
        _warn({name: how for name, how in self.found.items() if name not in _named})

    def take(self, other: Met) -> None:
        """Add what ``other`` has met; whoever takes it names it."""
        for operation, handling in other.found.items():
            self._add(operation, handling)
        _mark(other.found)

    def rows(self, plan: Plan) -> tuple[PlanRow, ...]:
        """Lines for ``switch.explain()``."""
        store = plan.recipe.store.name
        return tuple(
            PlanRow(
                kind=f"in no list: {', '.join(names)}",
                executor=Executor.NATIVE,
                reads=store,
                accumulates="fp32" if handling is Handling.WIDE else "",
                writes="fp32" if handling is Handling.WIDE and not plan.narrow_writes else store,
                why=handling.value,
            )
            for handling, names in _by_handling(self.found).items()
        )


def _by_handling(found: dict[str, Handling]) -> dict[Handling, list[str]]:
    """Names in the order in which they were met, by what was done with them."""
    return {
        handling: names
        for handling in Handling
        if (names := [name for name, how in found.items() if how is handling])
    }


def described(found: dict[str, Handling]) -> str:
    """The operations in one line."""
    parts = _by_handling(found).items()
    return "in no list: " + "; ".join(f"{', '.join(names)}: {how.value}" for how, names in parts)


def _warn(found: dict[str, Handling]) -> None:
    if found:
        _mark(found)
        warnings.warn(f"halfstep: {described(found)}", RuntimeWarning, stacklevel=3)


def _mark(names: Iterable[str]) -> None:
    for name in names:
        _named.add(name)
        _unnamed.pop(name, None)


@atexit.register
def _name_rest() -> None:
    _warn(dict(_unnamed))
