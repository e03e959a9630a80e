"""What an experiment hands back: findings beside the published figures, and panels to be drawn.

Commands and pages read these; they compute nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

__all__ = [
    "Axis",
    "Curve",
    "Curves",
    "Finding",
    "Panel",
    "Result",
    "Span",
    "Spans",
    "Ticks",
    "as_plain",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A published claim, what was measured here, and the interval that counts as the same.

    ``published`` is written as the source has it; ``derivation`` says where ``low`` and ``high``
    come from, which is never from the measurement.
    """

    claim: str
    published: str
    ours: float
    low: float
    high: float
    derivation: str
    source: str

    @property
    def reproduced(self) -> bool:
        """Whether the measurement is in the interval, ends included; a NaN is in none."""
        return self.low <= self.ours <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A title; ``log`` axes are ticked in powers of two."""

    title: str
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points that belong together. Curves of one ``hue`` (a format's name) share a colour;
    ``theory`` is what a formula says.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    hue: str = ""
    theory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """A panel of curves; ``name`` is its identifier on the page."""

    name: str
    title: str
    x: Axis
    y: Axis
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """From ``low`` by ``middle`` to ``high``, all positive: what lies below ``middle`` is worse."""

    name: str
    low: float
    middle: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """A panel of bars on a logarithmic axis; ``below`` and ``above`` name the two parts of each."""

    name: str
    title: str
    x: Axis
    below: str
    above: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticks:
    """A panel of number lines: for each name the values marked on its line."""

    name: str
    title: str
    x: Axis
    rows: Mapping[str, tuple[float, ...]]


Panel = Curves | Spans | Ticks


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One experiment, done: ``setting`` says what was computed, ``lesson`` what to take home."""

    name: str
    title: str
    setting: str
    lesson: str
    seed: int
    findings: tuple[Finding, ...]
    panels: tuple[Panel, ...]

    @property
    def reproduced(self) -> bool:
        """Whether every finding was."""
        return all(finding.reproduced for finding in self.findings)


def as_plain(it: object) -> Any:
    """Dataclasses, mappings and tuples as JSON values; a finding also says whether it was
    reproduced.
    """
    if is_dataclass(it) and not isinstance(it, type):
        plain = {field.name: as_plain(getattr(it, field.name)) for field in fields(it)}
        return plain | {"reproduced": it.reproduced} if isinstance(it, Finding | Result) else plain
    if isinstance(it, Mapping):
        return {str(key): as_plain(value) for key, value in it.items()}
    if isinstance(it, tuple):
        return [as_plain(value) for value in it]
    return it
