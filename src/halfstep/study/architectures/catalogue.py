"""The architectures: one row each, of libraries that were not written for halfstep."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from halfstep.study.architectures.architecture import Architecture
from halfstep.study.architectures.language import LANGUAGE
from halfstep.study.architectures.others import OTHERS

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {row.name: row for row in (*LANGUAGE, *OTHERS)}
)
