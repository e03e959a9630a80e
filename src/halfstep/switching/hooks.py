"""Hooks on gradients inside the region are called with true FP32 gradients, as in FP32 training.

Gradient logging, gradient reversal and Grad-CAM read or change a gradient in the middle of a backward, where
it is multiplied by the loss scale. They are given it divided; what they return is multiplied again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import ScaledGradientError
from halfstep.switching.boundary import OUTWARD, Gate, scaled, unscaled
from halfstep.switching.graph_walk import Intervals
from halfstep.switching.region import current

__all__ = ["install"]

_lock = threading.Lock()
_known: list[tuple[Gate, Intervals]] = []
_undo: list[Callable[[], None]] = []


def install(gate: Gate, inside: Intervals) -> Callable[[], None]:
    """Watch hooks on tensors made ``inside``, whose gradients pass ``gate``; returns what ends it."""
    entry = (gate, inside)
    with _lock:
        if not _known:
            _undo.append(_patch_tensor())
        _known.append(entry)

    def uninstall() -> None:
        with _lock:
            _known.remove(entry)
            if not _known:
                _undo.pop()()

    return uninstall


def _gate_of(t: Tensor) -> Gate | None:
    """The gate that scaled what ``t``'s gradient will be; None for a tensor outside of every region."""
    node: Any = t.grad_fn
    if node is None or isinstance(node, OUTWARD):
        return None
    number = node._sequence_nr()
    region = current()
    if region is not None and number >= region.first_node:
        return region.gate if region.lowers_through_boundary else None
    return next((gate for gate, inside in tuple(_known) if number in inside), None)


def _patch_tensor() -> Callable[[], None]:
    register_hook, retain_grad = torch.Tensor.register_hook, torch.Tensor.retain_grad

    def register_unscaled(self: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        gate = _gate_of(self)
        return register_hook(self, hook if gate is None else _on_true_gradient(hook, gate))

    def refuse_to_retain(self: Tensor) -> None:
        if _gate_of(self) is not None:
            node: Any = self.grad_fn
            raise ScaledGradientError(
                f"retain_grad() on an activation made inside a switched model (the result of {node.name()}): "
                "its .grad would be multiplied by the loss scale. Read the gradient in a hook, "
                "activation.register_hook(f): f is called with the true gradient"
            )
        retain_grad(self)

    torch.Tensor.register_hook = register_unscaled
    torch.Tensor.retain_grad = refuse_to_retain  # pyright: ignore[reportAttributeAccessIssue]

    def undo() -> None:
        torch.Tensor.register_hook = register_hook
        del torch.Tensor.retain_grad  # it is the base class's

    return undo


def _on_true_gradient(hook: Callable[[Tensor], Any], gate: Gate) -> Callable[[Tensor], Any]:
    def on_scaled(grad: Tensor) -> Any:
        given = hook(unscaled(grad, gate))
        return None if given is None else scaled(given, gate, grad.dtype)

    return on_scaled
