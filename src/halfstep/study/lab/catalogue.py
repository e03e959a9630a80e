"""Every experiment by the name that the command line has for it."""

from __future__ import annotations

from collections.abc import Callable

from halfstep.study.lab.dot_length import dot_length
from halfstep.study.lab.formats import formats
from halfstep.study.lab.promotion import promotion
from halfstep.study.lab.results import Result
from halfstep.study.lab.swamping import swamping
from halfstep.study.lab.updates import updates

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, Callable[[int], Result]] = {
    "swamping": swamping,
    "dot-length": dot_length,
    "promotion": promotion,
    "updates": updates,
    "formats": formats,
}
