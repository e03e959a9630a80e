"""A launched script under ``halfstep.emulate``: ``halfstep run --emulate``."""

from __future__ import annotations

from halfstep.recipe import Recipe
from halfstep.switching.emulation.emulate import Emulation
from halfstep.switching.emulation.summary import EmulationSummary

__all__ = ["EmulatedScript"]


class EmulatedScript:
    """Emulates ``recipe`` from `install` until the process ends, what it does at its exit included.

    Raises:
        SwitchError: emulate cannot do the recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._emulation = Emulation(recipe)

    def install(self) -> None:
        """Emulate from now on, on this thread and on those that it starts."""
        self._emulation.__enter__()

    def summary(self) -> EmulationSummary:
        """What the script has come to so far."""
        return self._emulation.summary()
