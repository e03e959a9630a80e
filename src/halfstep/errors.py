"""Every exception that halfstep raises on purpose.

::

    HalfstepError
    ├── UnknownNameError (KeyError)      a format, recipe, machine ... that does not exist
    ├── FormatError (ValueError)         a number format that cannot be
    ├── RecipeError (ValueError)         a recipe that cannot be
    ├── OperandError (ValueError)        a tensor or option an operation cannot take
    ├── SwitchError (RuntimeError)       the switch cannot do what was asked
    │   ├── ScaledGradientError          a gradient would leave the region still scaled
    │   └── BrokenPromiseError           something is not kept in the format that the recipe says
    ├── NonFiniteError (FloatingPointError)  not finite, and no loss scale mends it
    ├── CheckpointError (RuntimeError)   a checkpoint is damaged, too new, or of another program
    └── DataError (RuntimeError)         a data set cannot be fetched or is not the one expected
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "BrokenPromiseError",
    "CheckpointError",
    "DataError",
    "FormatError",
    "HalfstepError",
    "NonFiniteError",
    "OperandError",
    "RecipeError",
    "ScaledGradientError",
    "SwitchError",
    "UnknownNameError",
]


class HalfstepError(Exception):
    """The root: ``except halfstep.errors.HalfstepError`` catches all of ours and nothing else."""


class UnknownNameError(HalfstepError, KeyError):
    """A name that is in no catalogue; the message suggests the nearest ones."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        known = sorted(known)
        text = str(name)
        near = difflib.get_close_matches(text.lower(), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        self.message = f"unknown {kind} {text!r}; {hint}"
        super().__init__(self.message)

    def __str__(self) -> str:  # KeyError would print the repr
        return self.message


class FormatError(HalfstepError, ValueError):
    """A number format that cannot be."""


class RecipeError(HalfstepError, ValueError):
    """A recipe that cannot be."""


class OperandError(HalfstepError, ValueError):
    """A tensor or an option that an operation cannot take."""


class SwitchError(HalfstepError, RuntimeError):
    """The switch cannot do what was asked."""


class ScaledGradientError(SwitchError):
    """A gradient would have left the region still scaled, or entered it unscaled."""


class BrokenPromiseError(SwitchError):
    """Weights, gradients, optimizer state or sums are not kept as the recipe says.

    ``audit`` is the ``halfstep.switching.Audit`` that found it: everything that it looked at, as data.
    """

    def __init__(self, message: str, audit: object) -> None:
        self.audit: Any = audit
        super().__init__(message)


class NonFiniteError(HalfstepError, FloatingPointError):
    """Gradients or loss are not finite, and lowering the loss scale cannot mend it.

    ``finding`` is a ``halfstep.switching.Finding`` where the step was run again to find the cause; else "".
    """

    def __init__(self, message: str, finding: object = "") -> None:
        self.finding: Any = finding
        super().__init__(message)


class CheckpointError(HalfstepError, RuntimeError):
    """A checkpoint is damaged, of a newer version, or does not fit what it is loaded into."""


class DataError(HalfstepError, RuntimeError):
    """A data set cannot be fetched, or is not the one expected."""
