"""What a switch has put into the process: taken away by ``off()``, or after its model was dropped."""

from __future__ import annotations

import weakref
from collections.abc import Callable

__all__ = ["Machinery", "take_away_dropped"]

# What was installed for switched models that were dropped without off(). Python may drop them at any
# allocation, in the middle of an installation too: so it is taken away when the next switch is made.
_dropped: list[list[Callable[[], None]]] = []


class Machinery:
    """Functions that take away what was installed for ``owner``, called once."""

    def __init__(self, owner: object) -> None:
        take_away_dropped()
        self._removers: list[Callable[[], None]] = []
        self._when_dropped = weakref.finalize(owner, _dropped.append, self._removers)
        self._when_dropped.atexit = False

    def add(self, remove: Callable[[], None]) -> None:
        """Note what takes away something that is now installed."""
        self._removers.append(remove)

    def remove(self) -> None:
        """Take it all away, in the order in which it was installed."""
        self._when_dropped.detach()
        _call_all(self._removers)


def take_away_dropped() -> None:
    """Take away what was installed for models that have been dropped."""
    while _dropped:
        _call_all(_dropped.pop())


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
