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

from halfstep import ops

_NARROW = (torch.float16, torch.bfloat16)

__all__ = ["INWARD", "OUTWARD", "Gate", "enter", "leave", "lower_many", "scaled", "unscaled"]


class Gate:
    """The loss scale as the boundary sees it: ``scale`` now, and who is told of a backward that enters.

    ``gave`` is set when a gradient leaves that a loss may be made of: an input's, or one with a graph.
    """

    __slots__ = ("gave", "on_backward", "scale")

    def __init__(self, scale: float) -> None:
        self.scale: float = scale
        self.gave = False
        self.on_backward: Callable[[], None] = _ignore


def _ignore() -> None:
    return None


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _NARROW else x.dtype


def _wide(x: Tensor) -> Tensor:
    """``x`` as it is scaled: 16-bit numbers in FP32; FP32, FP64 and complex ones as they are."""
    return x.to(_wide_dtype(x))


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate, factor: float, dtype: torch.dtype) -> Tensor:
        ctx.gate, ctx.factor, ctx.dtype = gate, factor, x.dtype
        y = _wide(x).mul(factor) if factor != 1.0 else x
        return y.to(dtype) if y.dtype != dtype else (y.clone() if y is x else y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.gate.gave = True
        return (
            _Leave.apply(grad, ctx.gate, ctx.gate.scale / ctx.factor, ctx.dtype),
            None,
            None,
            None,
        )


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate, factor: float, dtype: torch.dtype) -> Tensor:
        ctx.gate, ctx.factor, ctx.dtype = gate, factor, x.dtype
        y = x.to(dtype)
        if factor != 1.0:
            return y.div(factor) if y is x else y.div_(factor)
        return y.clone() if y is x else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.gate.on_backward()
        return (
            _Enter.apply(grad, ctx.gate, ctx.gate.scale / ctx.factor, ctx.dtype),
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
            ctx.gate.gave = True
            out = [
                None if g is None else _Leave.apply(g, ctx.gate, scale, dtype)
                for g, dtype in zip(grads, ctx.dtypes, strict=True)
            ]
        else:
            out = _unscaled(ctx.gate, grads, ctx.dtypes)
        return None, None, *out


def _unscaled(
    gate: Gate,
    grads: tuple[Tensor | None, ...],
    dtypes: tuple[torch.dtype, ...],
) -> list[Tensor | None]:
    """Each gradient over the scale in its master's dtype, a bucket in one go."""
    out: list[Tensor | None] = [None] * len(grads)
    narrow: list[int] = []
    for k, (grad, dtype) in enumerate(zip(grads, dtypes, strict=True)):
        if grad is None:
            continue
        dense = grad.layout is torch.strided
        if dense and dtype == torch.float32 and grad.dtype in _NARROW and grad.device.type == "cpu":
            narrow.append(k)
        else:
            copy = gate.scale != 1.0
            out[k] = grad.to(dtype, copy=copy)
    if gate.scale != 1.0:
        wide = [g for g in out if g is not None]
        if wide:
            torch._foreach_div_(wide, gate.scale)  # pyright: ignore[reportPrivateImportUsage]
    if narrow:
        wide = ops.unscale([grads[k] for k in narrow], gate.scale)  # pyright: ignore[reportArgumentType]
        for k, grad in zip(narrow, wide, strict=True):
            out[k] = grad
    return out


def enter(x: Tensor, gate: Gate, dtype: torch.dtype) -> Tensor:
    """``x`` inside the region, rounded to ``dtype``; its gradient leaves unscaled, in ``x``'s dtype."""
    return _Enter.apply(x, gate, 1.0, dtype)  # pyright: ignore[reportReturnType]


def leave(x: Tensor, gate: Gate, dtype: torch.dtype) -> Tensor:
    """``x`` outside the region, in ``dtype``; the gradient that comes back is scaled before it is rounded."""
    return _Leave.apply(x, gate, 1.0, dtype)  # pyright: ignore[reportReturnType]


def unscaled(grad: Tensor, gate: Gate) -> Tensor:
    """A gradient inside the region as it is outside: over the scale, in FP32 where it was in 16 bits."""
    return _Leave.apply(grad, gate, gate.scale, _wide_dtype(grad))  # pyright: ignore[reportReturnType]


def scaled(grad: Tensor, gate: Gate, dtype: torch.dtype) -> Tensor:
    """The way back of `unscaled`."""
    return _Enter.apply(grad, gate, gate.scale, dtype)  # pyright: ignore[reportReturnType]


def lower_many(
    masters: list[Tensor], gate: Gate, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, ...]:
    """Working copies of ``masters``, one dtype each; gradients leave unscaled, in the master's dtype."""
    return _LowerMany.apply(gate, dtypes, *masters)  # pyright: ignore[reportReturnType]


# The graph nodes of the boundary, by the way that a forward passes them; each knows its ``gate``.
INWARD: tuple[type, ...] = tuple(
    f._backward_cls  # pyright: ignore[reportAttributeAccessIssue]
    for f in (_Enter, _LowerMany)
)
OUTWARD: tuple[type, ...] = (_Leave._backward_cls,)  # pyright: ignore[reportAttributeAccessIssue]
