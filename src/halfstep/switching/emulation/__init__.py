"""A whole program in a recipe, operation by operation, below autograd."""

from halfstep.switching.emulation.emulate import Emulation, emulate
from halfstep.switching.emulation.script import EmulatedScript
from halfstep.switching.emulation.summary import EmulationSummary

__all__ = ["EmulatedScript", "Emulation", "EmulationSummary", "emulate"]
