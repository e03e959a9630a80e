"""No gradient leaves scaled, none enters unscaled: the autograd graph is walked to see that.

A gradient inside the region is multiplied by the loss scale. Should the graph reach a tensor outside by
any way but the boundary, its gradient would be wrong by the scale with no other sign of it: the one
failure that the design must make impossible.

From the loss to the boundary every backward is walked. The region's own graph is walked on first calls,
after every change of the module tree, on calls 2, 4, 8, 16 ..., and whenever it has another shape than
those that were walked before: another number of nodes, or outputs of other dtypes. An FP32 tensor that
comes in past the boundary shows in one or the other: it is cast by the operation that reads it, which
makes a node, or makes that operation's result FP32, up to the next cast or the output.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import ScaledGradientError
from halfstep.switching.boundary import INWARD, OUTWARD, Gate

__all__ = ["Intervals", "Schedule", "check_forward", "check_roots", "check_wanted", "has_left"]

_SHAPES_KEPT = 4096


def _references(node: Any) -> int:
    """References to the leaf of ``node``, an AccumulateGrad, counted alike wherever it is asked."""
    return sys.getrefcount(node.variable)


def _held_by_the_graph_only() -> int:
    """What `_references` says of a leaf that no one else holds."""
    product = torch.ones(1).requires_grad_() * 2
    node: Any = product.grad_fn
    return _references(node.next_functions[0][0])


_GRAPH_ONLY = _held_by_the_graph_only()


class Schedule:
    """True on the first calls, after `restart`, for each new shape, and then ever more rarely."""

    __slots__ = ("_calls", "_shapes")

    def __init__(self) -> None:
        self._calls = 0
        self._shapes: set[object] = set()

    def restart(self) -> None:
        """Begin again: something has changed."""
        self._calls = 0
        self._shapes.clear()

    def due(self, shape: object) -> bool:
        """Count one call whose graph has this shape; True where it is to be walked."""
        self._calls += 1
        if shape not in self._shapes:
            if len(self._shapes) >= _SHAPES_KEPT:
                self._shapes.clear()
            self._shapes.add(shape)
            return True
        return self._calls <= 3 or self._calls & (self._calls - 1) == 0


class Intervals(threading.local):
    """Which graph nodes were made inside a region: torch numbers the nodes of each thread in order.

    Each thread sees its own: the numbers of another's nodes would say nothing.
    """

    def __init__(self, keep: int = 4096) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._keep = keep

    def add(self, start: int, end: int) -> None:
        """Nodes ``start`` to ``end - 1`` were made inside."""
        self._starts.append(start)
        self._ends.append(end)
        if len(self._starts) > self._keep:
            del self._starts[: self._keep // 2], self._ends[: self._keep // 2]

    def __contains__(self, number: int) -> bool:
        k = bisect_right(self._starts, number) - 1
        return k >= 0 and number < self._ends[k]


def check_forward(
    outputs: Iterable[Tensor],
    *,
    gate: Gate,
    first_node: int,
    inside: Intervals,
    inputs: Iterable[Tensor],
    where: str,
    describe: Callable[[Tensor], str],
) -> None:
    """Raise `ScaledGradientError` where the region's graph reaches out of it past the boundary.

    ``first_node`` is the number at which this region's nodes begin. Nodes ``inside`` earlier regions of the
    same switch are scaled alike (a state kept from one forward to the next). ``inputs`` are leaves whose
    gradient is meant to stay scaled: what a checkpointed function was given.
    """
    known = {id(t) for t in inputs}
    seen: set[Any] = set()
    # A tensor that has left already may be an output: it is not made to leave again.
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None and not has_left(t)]
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, INWARD) and node.gate is gate:
            continue
        if isinstance(node, (*INWARD, *OUTWARD)):
            what = "of another" if isinstance(node, INWARD) else "or of switch.outside()"
            raise ScaledGradientError(
                f"{where}: forward used a tensor that has left the region: an output of an earlier forward "
                f"of a switched model, {what}. Its gradient would be multiplied by a loss scale twice. "
                "Pass it to forward as an input, detach it, or use it before it leaves"
            )
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) in known:
                continue
            kind = type(leaf)
            del leaf
            # Made inside forward and held by nothing but the graph: no one can see its gradient.
            if kind is Tensor and _references(node) <= _GRAPH_ONLY:
                continue
            leaf = getattr(node, "variable")  # noqa: B009 - no attribute to the type checker
            raise ScaledGradientError(
                f"{where}: forward used {describe(leaf)} past the boundary of the region, so its "
                "gradient would leave multiplied by the loss scale. Make it a parameter of a module that "
                "is part of the switched model (not in a plain list, a closure or another object), or "
                "pass it to forward as an input"
            )
        number = node._sequence_nr()
        if number < first_node and number not in inside:
            raise ScaledGradientError(
                f"{where}: forward used a tensor computed outside the region (the result of "
                f"{node.name()}) that is no input of forward, so its gradient would leave multiplied by "
                "the loss scale. Pass it to forward as an input, or detach it"
            )
        stack.extend(n for n, _ in node.next_functions if n is not None)


def has_left(t: Tensor) -> bool:
    """True for a tensor that has passed the boundary outwards."""
    return isinstance(t.grad_fn, OUTWARD)


def check_roots(roots: Iterable[Tensor], gate: Gate, inside: Intervals) -> None:
    """Raise `ScaledGradientError` where a backward would enter a region past its boundary."""
    seen: set[Any] = set()
    stack: list[tuple[Any, str]] = [
        (t.grad_fn, "the tensor that backward was called on")
        for t in roots
        if t.grad_fn is not None
    ]
    while stack:
        node, user = stack.pop()
        if node in seen or isinstance(node, OUTWARD) or getattr(node, "variable", None) is not None:
            continue
        seen.add(node)
        if isinstance(node, INWARD) and node.gate is gate:
            raise ScaledGradientError(
                f"a working copy that was read inside a switched model is used outside of it by {user}: "
                "its gradient would be divided by a loss scale that it was never multiplied by. Outside "
                "of forward read the parameter itself, or pass the copy through switch.outside(...)"
            )
        if node._sequence_nr() in inside:
            raise ScaledGradientError(
                f"an activation made inside a switched model (the result of {node.name()}) is used "
                f"outside of it by {user}: its gradient would enter the region without the loss scale. "
                "Return the activation from forward as part of the output, or pass it through "
                "switch.outside(activation) where it is captured"
            )
        stack.extend((n, node.name()) for n, _ in node.next_functions if n is not None)


def check_wanted(wanted: Iterable[Any], inside: Intervals) -> None:
    """Raise `ScaledGradientError` where a backward is asked for the gradient of an inside activation."""
    for given in wanted:
        node = given.grad_fn if isinstance(given, Tensor) else getattr(given, "node", None)
        if node is None or isinstance(node, OUTWARD) or node._sequence_nr() not in inside:
            continue
        raise ScaledGradientError(
            f"a gradient was asked for with respect to an activation made inside a switched model (the "
            f"result of {node.name()}): it would come multiplied by the loss scale. Read it in a hook, "
            "activation.register_hook(f) or module.register_full_backward_hook(f): f is called with the "
            "true gradient"
        )
