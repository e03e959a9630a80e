"""Every experiment by the name that the command line has for it."""

from __future__ import annotations

from collections.abc import Callable

from halfstep.study.lab.formats import formats
from halfstep.study.lab.results import Result
from halfstep.study.lab.updates import updates

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, Callable[[int], Result]] = {
    "updates": updates,
    "formats": formats,
}
