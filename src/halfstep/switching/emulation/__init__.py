"""A whole program in a recipe, operation by operation, below autograd."""

from halfstep.switching.emulation.emulate import Emulation, emulate
from halfstep.switching.emulation.summary import EmulationSummary

__all__ = ["Emulation", "EmulationSummary", "emulate"]
