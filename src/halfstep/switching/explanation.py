"""The table that ``switch.explain()`` gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from halfstep.switching.plan import PlanRow

__all__ = ["Explanation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Each kind of operation with its executor and the reason; prints as a table."""

    recipe: str
    device: str
    rows: tuple[PlanRow, ...]
    times: Mapping[str, float] = field(default_factory=dict, compare=False)
    """kind -> time of forward and backward over that of FP32, measured here; empty where nothing was."""

    def __str__(self) -> str:
        head = ("operations", "executor", "reads", "adds in", "writes", "time", "why")
        body = [
            (r.kind, r.executor.value, r.reads, r.accumulates, r.writes, self._time(r), r.why)
            for r in self.rows
        ]
        if not self.times:
            head, *body = ((*row[:-2], row[-1]) for row in (head, *body))
        widths = [max(len(row[k]) for row in [head, *body]) for k in range(len(head) - 1)]
        lines = [f"recipe {self.recipe} on {self.device}"]
        for row in [head, *body]:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        return "\n".join(lines)

    def _time(self, row: PlanRow) -> str:
        ratio = self.times.get(row.kind)
        return "" if ratio is None else f"{ratio:.{1 if ratio < 10 else 0}f}x FP32"
