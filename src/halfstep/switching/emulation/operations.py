"""What an emulator knows of one aten overload: how it is treated, and what it writes to."""

from __future__ import annotations

from typing import Any

import torch

from halfstep.recipe import WIDE_OUTPUTS, OpPolicy, Traits, Treatment, treatment

__all__ = ["Operation"]

# Running statistics that a schema does not own up to writing.
_HIDDEN_WRITES = {
    "native_batch_norm": (3, 4),
    "cudnn_batch_norm": (3, 4),
    "miopen_batch_norm": (3, 4),
}


# Axes that are summed over, tensor by tensor; what is added to (a bias) has none, and any will do.
_SUMMED = {
    "mm": (-1, -2),
    "bmm": (-1, -2),
    "mv": (-1, -1),
    "dot": (-1, -1),
    "linear": (-1, -1),
    "matmul": (-1, -2),
    "addmm": (-1, -1, -2),
    "addbmm": (-1, -1, -2),
    "baddbmm": (-1, -1, -2),
    "addmv": (-1, -1, -1),
}


class Operation:
    """One overload, and how often it was seen."""

    __slots__ = (
        "count",
        "is_dot",
        "is_wide",
        "kind",
        "lists",
        "moves",
        "name",
        "no_kernel",
        "op",
        "outs",
        "pointwise",
        "run",
        "summed",
        "text",
        "wide",
        "writes",
        "writes_beside",
    )

    def __init__(self, op: torch._ops.OpOverload, policy: OpPolicy) -> None:
        schema = op._schema
        namespace, _, self.name = schema.name.partition("::")
        self.op = op
        self.run = op._op
        """The same without Python's layer around it."""
        self.text = str(op)
        self.count = 0
        self.no_kernel = False
        """torch has no kernel of it in the store format's dtype."""
        types = [str(a.type) for a in schema.arguments]
        self.lists = any("List" in t and "Tensor" in t for t in types)
        written = [k for k, a in enumerate(schema.arguments) if _is_written(a)]
        positional = [k for k in written if not schema.arguments[k].kwarg_only]
        self.writes = (*positional, *_HIDDEN_WRITES.get(self.name, ()))
        """Positions of the arguments that are written to."""
        self.summed = _SUMMED.get(self.name.removesuffix("_"), ())
        """For each operand of a dot product, the axis that it sums over."""
        owned = any(r.alias_info is not None for r in schema.returns)
        self.writes_beside = self.name in _HIDDEN_WRITES or (bool(written) and not owned)
        """Results are new tensors, though an argument is written to, too (noise, statistics)."""
        self.outs = tuple(
            schema.arguments[k].name for k in written if schema.arguments[k].kwarg_only
        )
        """Names of the arguments that results are written to."""
        self.pointwise = torch.Tag.pointwise in op.tags
        self.wide = WIDE_OUTPUTS.get(self.name, ())
        gives = any("Tensor" in str(r.type) for r in schema.returns) or bool(written)
        traits = Traits(
            view=op.is_view or torch.Tag.inplace_view in op.tags,
            pointwise=self.pointwise,
            reduction=torch.Tag.reduction in op.tags,
            random=torch.Tag.nondeterministic_seeded in op.tags,
            makes=not any("Tensor" in t for t in types),
            gives_tensors=gives,
        )
        if namespace == "aten":
            self.kind = treatment(policy, self.name, op._overloadname, traits)
        elif namespace in ("halfstep", "profiler", "prim", "prims"):
            self.kind = Treatment.FREE
        else:
            self.kind = Treatment.UNKNOWN if gives else Treatment.FREE
        self.moves = self.kind in (Treatment.MOVE, Treatment.MAKE, Treatment.CAST)
        self.is_dot = self.kind is Treatment.DOT
        self.is_wide = self.kind is Treatment.WIDE


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
