"""The table that ``switch.explain()`` gives."""

from __future__ import annotations

from dataclasses import dataclass

from halfstep.switching.plan import PlanRow

__all__ = ["Explanation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Each kind of operation with its executor and the reason; prints as a table."""

    recipe: str
    device: str
    rows: tuple[PlanRow, ...]

    def __str__(self) -> str:
        head = ("operations", "executor", "reads", "adds in", "writes", "why")
        body = [
            (r.kind, r.executor.value, r.reads, r.accumulates, r.writes, r.why) for r in self.rows
        ]
        widths = [max(len(row[k]) for row in [head, *body]) for k in range(len(head) - 1)]
        lines = [f"recipe {self.recipe} on {self.device}"]
        for row in [head, *body]:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        return "\n".join(lines)
