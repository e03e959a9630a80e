"""What an audit has found, as data: a row for each parameter, the promises that are broken, a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfstep.errors import BrokenPromiseError
from halfstep.switching.plan import PlanRow

__all__ = ["Audit", "AuditRow", "BrokenPromise", "Held"]

_NAMED = 5
_SHORT = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float64": "fp64",
    "float8_e4m3fn": "e4m3fn",
    "float8_e5m2": "e5m2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """How a tensor is held: torch's dtype, and the format whose numbers it has.

    Both are empty for what is not there: no gradient yet, a working copy that no forward reads.
    """

    dtype: str = ""
    format: str = ""

    @classmethod
    def of(cls, dtype: object, format: object = "") -> Held:
        """Of torch's ``dtype``; the numbers are the dtype's own unless ``format`` says otherwise."""
        name = str(dtype).removeprefix("torch.")
        return cls(dtype=name, format=str(format) or _SHORT.get(name, name))

    def __str__(self) -> str:
        if not self.dtype:
            return "-"
        plain = _SHORT.get(self.dtype, self.dtype)
        return plain if plain == self.format else f"{plain} ({self.format} numbers)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """One parameter: how it, its copy in the region, its gradient and its optimizer state are held.

    ``also``: its other names, where it is tied. ``optimizers``: those that hold it; empty: none does.
    ``state``: by the optimizer's own name, ``exp_avg`` and the like; step counts are left out.
    """

    parameter: str
    also: tuple[str, ...]
    shape: tuple[int, ...]
    trained: bool
    """It requires a gradient; else it is frozen."""
    weight: Held
    working: Held
    gradient: Held
    optimizers: tuple[str, ...]
    state: Mapping[str, Held] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenPromise:
    """``what`` of the model is ``found`` so, the recipe has ``promised`` otherwise, and what to do."""

    what: str
    found: str
    promised: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} is {self.found}; promised: {self.promised}. {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Every parameter with its dtypes, who computes what in which accumulator, and what is not as promised.

    Prints as a table; ``as_dict()`` is plain values. ``foreign``: what the optimizers hold besides the
    model's parameters, which is no breach (a loss with weights of its own). ``notes``: what torch may do by
    default that is a little less than promised.
    """

    recipe: str
    device: str
    loss_scale: float
    optimizers: tuple[str, ...]
    rows: tuple[AuditRow, ...]
    computing: tuple[PlanRow, ...]
    foreign: tuple[str, ...]
    broken: tuple[BrokenPromise, ...]
    notes: tuple[str, ...] = ()

    def check(self) -> Audit:
        """This, where every promise is kept.

        Raises:
            BrokenPromiseError: one is not; the first few are named, all are in ``error.audit.broken``.
        """
        if not self.broken:
            return self
        told = [str(it) for it in self.broken[:_NAMED]]
        if len(self.broken) > _NAMED:
            told.append(f"and {len(self.broken) - _NAMED} more, in error.audit.broken")
        head = f"recipe {self.recipe} is not kept: "
        raise BrokenPromiseError(head + "\n".join(told), self)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        record = dataclasses.asdict(self)
        for row in record["computing"]:
            row["executor"] = row["executor"].value
        return record

    def __str__(self) -> str:
        by = " and ".join(self.optimizers) or "no optimizer"
        lines = [
            f"recipe {self.recipe} on {self.device}, {by}, loss scale {self.loss_scale:g}",
            *_table(self.rows),
        ]
        for row in self.computing:
            adds = f"{row.kind}: read {row.reads}, add in {row.accumulates}, write {row.writes}"
            lines.append(f"{adds} ({row.executor.value}: {row.why})")
        lines += [f"not the model's: {text}" for text in self.foreign]
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"BROKEN: {it}" for it in self.broken]
        if not self.broken:
            lines.append("every promise of the recipe is kept")
        return "\n".join(lines)


_HEAD = ("parameter", "shape", "weight", "working copy", "gradient", "optimizer", "state")


def _table(rows: tuple[AuditRow, ...]) -> list[str]:
    body = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(row[k]) for row in body) for k in range(len(_HEAD))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in body
    ]


def _cells(row: AuditRow) -> tuple[str, ...]:
    name = row.parameter + "".join(f" = {other}" for other in row.also)
    shape = "x".join(map(str, row.shape)) or "()"
    by = ", ".join(row.optimizers) or ("none" if row.trained else "-")
    by = by if row.trained else f"{by} (frozen)".removeprefix("- ")
    held: dict[str, list[str]] = {}
    for key, value in row.state.items():
        held.setdefault(str(value), []).append(key)
    state = "; ".join(f"{value}: {', '.join(keys)}" for value, keys in held.items()) or "-"
    return name, shape, str(row.weight), str(row.working), str(row.gradient), by, state
