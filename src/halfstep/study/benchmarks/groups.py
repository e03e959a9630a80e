"""The parts of the table of the arithmetic; apart from it, because the command line loads no torch."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Group"]


class Group(StrEnum):
    """A part of the table."""

    ROUNDING = "rounding"
    BLOCKS = "blocks"
    MATMUL = "matmul"
    SHAPES = "shapes"
    MEMORY = "memory"
