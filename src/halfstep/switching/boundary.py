"""The border of the region: where a gradient is multiplied by the loss scale, and where it is divided.

Two autograd functions do all of it (DESIGN section 2, rule 5). With ``S`` the loss scale::

    enter(v): forward  x -> low(x * v)      backward  leave(S / v)
    leave(v): forward  x -> fp32(x) / v     backward  enter(S / v)

The model's outputs pass ``leave(1)``: their gradients come in times ``S`` before they are rounded.
Parameters and inputs pass ``enter(1)``: their gradients go out over ``S``, in FP32. The recursion is what
makes double backward right: a gradient of a gradient is again scaled while it is inside.

``S`` is read when the backward runs, not when the graph is built: a scale that changed between forward
and backward cancels all the same, since both doors of one backward read the same value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["BOUNDARY_NODES", "Gate", "enter", "leave", "lower_many"]


class Gate:
    """The loss scale as the boundary sees it: ``scale`` now, and a note of every backward that enters."""

    __slots__ = ("on_backward", "scale")

    def __init__(self, scale: float) -> None:
        self.scale: float = scale
        self.on_backward: Callable[[], None] = _ignore


def _ignore() -> None:
    return None


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate, factor: float, dtype: torch.dtype) -> Tensor:
        ctx.gate, ctx.factor, ctx.dtype = gate, factor, x.dtype
        y = x.to(torch.float32).mul(factor) if factor != 1.0 else x
        return y.to(dtype) if y.dtype != dtype else (y.clone() if y is x else y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (
            _Leave.apply(grad, ctx.gate, ctx.gate.scale / ctx.factor, ctx.dtype, False),
            None,
            None,
            None,
        )


class _Leave(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Gate, factor: float, dtype: torch.dtype, output: bool
    ) -> Tensor:
        ctx.gate, ctx.factor, ctx.dtype, ctx.output = gate, factor, x.dtype, output
        y = x.to(dtype)
        if factor != 1.0:
            return y.div(factor) if y is x else y.div_(factor)
        return y.clone() if y is x else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.output:
            ctx.gate.on_backward()
        return (
            _Enter.apply(grad, ctx.gate, ctx.gate.scale / ctx.factor, ctx.dtype),
            None,
            None,
            None,
            None,
        )


class _LowerMany(Function):
    """``enter(1)`` for a bucket of parameters at once: one node instead of one a parameter."""

    @staticmethod
    def forward(
        ctx: Any, gate: Gate, dtypes: tuple[torch.dtype, ...], *masters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.gate = gate
        ctx.dtypes = tuple(p.dtype for p in masters)
        ctx.set_materialize_grads(False)
        return tuple(
            p.to(dtype) if p.dtype != dtype else p.view_as(p)
            for p, dtype in zip(masters, dtypes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        scale = ctx.gate.scale
        if torch.is_grad_enabled():  # double backward: every step must leave a node
            out = [
                None if g is None else _Leave.apply(g, ctx.gate, scale, dtype, False)
                for g, dtype in zip(grads, ctx.dtypes, strict=True)
            ]
        else:
            out = _unscaled(grads, scale, ctx.dtypes)
        return None, None, *out


def _unscaled(
    grads: tuple[Tensor | None, ...], scale: float, dtypes: tuple[torch.dtype, ...]
) -> list[Tensor | None]:
    """Each gradient over ``scale`` in its master's dtype: one kernel for all on a GPU, beside the casts."""
    wide = [
        None if g is None else (g.to(dtype) if g.dtype != dtype else g.clone())
        for g, dtype in zip(grads, dtypes, strict=True)
    ]
    if scale != 1.0:
        torch._foreach_div_([g for g in wide if g is not None], scale)  # pyright: ignore
    return wide


def enter(x: Tensor, gate: Gate, dtype: torch.dtype) -> Tensor:
    """``x`` inside the region, rounded to ``dtype``; its gradient leaves unscaled, in ``x``'s dtype."""
    return _Enter.apply(x, gate, 1.0, dtype)  # pyright: ignore[reportReturnType]


def leave(x: Tensor, gate: Gate, dtype: torch.dtype) -> Tensor:
    """``x`` outside the region, in ``dtype``; the gradient that comes back is scaled before it is rounded."""
    return _Leave.apply(x, gate, 1.0, dtype, True)  # pyright: ignore[reportReturnType]


def lower_many(
    masters: list[Tensor], gate: Gate, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, ...]:
    """Working copies of ``masters``, one dtype each; gradients leave unscaled, in the master's dtype."""
    return _LowerMany.apply(gate, dtypes, *masters)  # pyright: ignore[reportReturnType]


# The graph nodes that are allowed to stand between the region and the rest of the graph.
BOUNDARY_NODES: tuple[type, ...] = tuple(
    f._backward_cls  # pyright: ignore[reportAttributeAccessIssue]
    for f in (_Enter, _Leave, _LowerMany)
)
