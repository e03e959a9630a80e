"""No gradient leaves scaled, none enters unscaled: the autograd graph is walked to see to that.

A gradient inside the region is multiplied by the loss scale. Should the graph reach a tensor outside by
any way but the boundary, its gradient would be wrong by the scale with no other sign of it: the one
failure that the design must make impossible. Where it does, the node at that place is given a hook that
divides by the scale, or multiplies; what cannot be mended so is an error (docs/decisions/0055).

From the loss to the boundary every backward is walked. The region's own graph is walked on first calls,
after every change of the module tree, on calls 2, 4, 8, 16 ..., and whenever it has another shape than
those that were walked before: another number of nodes, or outputs of other dtypes. An FP32 tensor that
comes in past the boundary shows in one or the other: it is cast by the operation that reads it, which
makes a node, or makes that operation's result FP32, up to the next cast or the output. Where one was
found, every call is walked from then on.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import ScaledGradientError
from halfstep.switching.boundary import INWARD, OUTWARD, Gate, scaled, unscaled

__all__ = [
    "Intervals",
    "Schedule",
    "check_wanted",
    "has_left",
    "is_backward_of",
    "is_outside",
    "mend_forward",
    "mend_roots",
]

_SHAPES_KEPT = 4096
_NO_NODE = 1 << 62
"""Above the number of any node: what is outside is then all that is not inside a region."""


def _references(node: Any) -> int:
    """References to the leaf of ``node``, an AccumulateGrad, counted alike wherever it is asked."""
    return sys.getrefcount(node.variable)


def _held_by_the_graph_only() -> int:
    """What `_references` says of a leaf that no one else holds."""
    product = torch.ones(1).requires_grad_() * 2
    node: Any = product.grad_fn
    return _references(node.next_functions[0][0])


_GRAPH_ONLY = _held_by_the_graph_only()


_all: weakref.WeakSet[Any] = weakref.WeakSet()
"""The `Intervals` of all switches."""


class Schedule:
    """True on the first calls, after `restart`, for each new shape, and then ever more rarely.

    Always where ``leaks``: a way past the boundary was found.
    """

    __slots__ = ("_calls", "_shapes", "leaks")

    def __init__(self) -> None:
        self.leaks = False
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
        return self.leaks or self._calls <= 3 or self._calls & (self._calls - 1) == 0


class Intervals(threading.local):
    """Which graph nodes were made inside a region: torch numbers the nodes of each thread in order.

    Each thread sees its own: the numbers of another's nodes would say nothing.
    """

    def __init__(self, keep: int = 4096) -> None:
        _all.add(self)
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


def mend_forward(
    outputs: Iterable[Tensor],
    *,
    gate: Gate,
    first_node: int,
    inside: Intervals,
    inputs: Iterable[Tensor],
    where: str,
) -> bool:
    """Have the gradients that leave a region past its boundary leave unscaled; True where there are any.

    They are those of leaves that forward reached itself (a parameter in a list, a closure, another object),
    of tensors computed outside that are no input, and of outputs of earlier forwards. ``first_node`` is the
    number at which this region's nodes begin. Nodes ``inside`` earlier regions of the same switch are scaled
    alike (a state kept from one forward to the next). ``inputs`` are leaves whose gradient is meant to stay
    scaled: what a checkpointed function was given.

    Raises:
        ScaledGradientError: beyond such a tensor the graph comes into a region again by another way than its
            outputs.
    """
    known = {id(t) for t in inputs}
    # A tensor that has left already may be an output: it is not made to leave again.
    starts = (t.grad_fn for t in outputs if t.grad_fn is not None and not has_left(t))
    stack = [n for n in starts if not (isinstance(n, INWARD) or is_outside(n, first_node, inside))]
    return _mend_from(stack, gate, first_node, inside, known, where)


def _mend_from(
    stack: list[Any], gate: Gate, first_node: int, inside: Intervals, known: set[int], where: str
) -> bool:
    """`mend_forward` from nodes of the region on."""
    seen: set[Any] = set()
    mended = False
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for k, (following, _) in enumerate(node.next_functions):
            if following is None or _stays_scaled(following, known):
                continue
            if isinstance(following, INWARD):
                if following.gate is gate:
                    continue
                raise ScaledGradientError(
                    f"{where}: forward used a working copy of another switched model: its gradient would be "
                    "divided by two loss scales. Read that model's parameter outside of its forward"
                )
            if not is_outside(following, first_node, inside):
                stack.append(following)
                continue
            mended = True
            _check_outside(following, where)
            _mend(node, k, functools.partial(_leave_by, gate, where))
    return mended


def _leave_by(gate: Gate, where: str, grad: Tensor | None) -> Tensor | None:
    """``grad`` as it leaves past the boundary; a graph of it would lead to that leaf again, unmended."""
    if torch.is_grad_enabled():
        raise ScaledGradientError(
            f"{where}: a second derivative (create_graph=True) of a forward that used a tensor past its "
            "boundary: a parameter that is in no module of the switched model, parameters() read inside "
            "forward, or a tensor computed outside. Make it a parameter of a module in the model, or pass "
            "it to forward as an input"
        )
    return _divide_by(gate, grad)


def _enter_by(gate: Gate, grad: Tensor | None) -> Tensor | None:
    gate.on_backward()
    return None if grad is None else scaled(grad, gate, grad.dtype)


def _divide_by(gate: Gate, grad: Tensor | None) -> Tensor | None:
    return None if grad is None else unscaled(grad, gate).to(grad.dtype)


def _stays_scaled(node: Any, known: set[int]) -> bool:
    """True for leaves whose gradient no one reads unscaled: those ``known``, and those made inside forward
    that nothing but the graph holds.
    """
    leaf = getattr(node, "variable", None)
    if leaf is None:
        return False
    if id(leaf) in known:
        return True
    kind = type(leaf)
    del leaf
    return kind is Tensor and _references(node) <= _GRAPH_ONLY


def is_outside(node: Any, first_node: int, inside: Intervals) -> bool:
    """True for a graph node that was not made in the region whose first is ``first_node``, nor ``inside``."""
    if getattr(node, "variable", None) is not None or isinstance(node, OUTWARD):
        return True
    number = node._sequence_nr()
    return number < first_node and number not in inside


def is_backward_of(inside: Intervals) -> bool:
    """True while the backward of a node ``inside`` runs on this thread: what it is given is scaled."""
    node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
    return node is not None and node._sequence_nr() in inside


def _check_outside(node: Any, where: str) -> None:
    """Raise `ScaledGradientError` where the graph from ``node``, outside, enters a region past its end."""
    seen: set[Any] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node in seen or isinstance(node, OUTWARD) or getattr(node, "variable", None) is not None:
            continue
        seen.add(node)
        if isinstance(node, INWARD) or any(node._sequence_nr() in one for one in tuple(_all)):
            raise ScaledGradientError(
                f"{where}: forward used a tensor computed outside from an activation made inside of a "
                f"switched model (the result of {node.name()}), which is no output of it: its gradient would "
                "enter there without the loss scale. Return that activation from forward as part of the "
                "output, or pass it through switch.outside(activation)"
            )
        stack.extend(n for n, _ in node.next_functions if n is not None)


def _mend(node: Any, place: int, change: Callable[[Tensor | None], Tensor | None]) -> None:
    """Have ``node`` give its gradient ``place`` changed: once, however often it is asked for."""
    mended: set[Any] = node.metadata.setdefault("halfstep", set())
    if place in mended:
        return
    mended.add(place)

    def hook(gives: tuple[Tensor | None, ...], given: Any) -> tuple[Tensor | None, ...]:
        return *gives[:place], change(gives[place]), *gives[place + 1 :]

    node.register_hook(hook)


def has_left(t: Tensor) -> bool:
    """True for a tensor that has passed the boundary outwards."""
    return isinstance(t.grad_fn, OUTWARD)


def mend_roots(roots: Iterable[Tensor], gate: Gate, inside: Intervals) -> None:
    """Have the gradients that enter a region past its end enter scaled.

    Into FP32 tensors they are multiplied at the edge. What reads a 16-bit tensor of the region is scaled as a
    whole, and all that is joined to it by 16-bit tensors: FP32 gradients that come in there are multiplied,
    those that go elsewhere divided. Backward functions are linear in what they are given.

    Raises:
        ScaledGradientError: one enters a working copy; or backward was called on an activation of the region
            itself, or on a 16-bit number made of one.
    """
    starts = [t for t in roots if t.grad_fn is not None and not isinstance(t.grad_fn, OUTWARD)]
    for t in starts:
        _check_entry(t.grad_fn, "the tensor that backward was called on", gate, inside)
    seen: set[Any] = set()
    stack: list[Any] = [t.grad_fn for t in starts]
    readers: dict[Any, list[tuple[Any, int]]] = {}  # of a node: who reads which of its results
    wide: list[tuple[Any, int]] = []
    narrow: list[Any] = []
    entered: list[Any] = []
    while stack:
        node = stack.pop()
        if node in seen or getattr(node, "variable", None) is not None:
            continue
        seen.add(node)
        for k, (following, which) in enumerate(node.next_functions):
            if following is None or isinstance(following, OUTWARD):
                continue
            if isinstance(following, INWARD):
                _check_entry(following, node.name(), gate, inside)
            if following._sequence_nr() not in inside:
                readers.setdefault(following, []).append((node, which))
                stack.append(following)
                continue
            entered.append(following)
            if _is_wide(following, which):
                wide.append((node, k))
            else:
                narrow.append(node)
    # what leads to no output was not walked after its forward
    _mend_from(entered, gate, _NO_NODE, inside, set(), "the switched model")
    drawn_in = _drawn_in(narrow, readers, inside, starts) if narrow else set()
    for node, k in wide:
        if node not in drawn_in:
            _mend(node, k, functools.partial(_enter_by, gate))
    for node in drawn_in:
        _scale_whole(node, gate, inside, drawn_in)


def _drawn_in(
    narrow: list[Any],
    readers: dict[Any, list[tuple[Any, int]]],
    inside: Intervals,
    starts: list[Tensor],
) -> set[Any]:
    """``narrow`` and all that is joined to them by 16-bit tensors: what is scaled with the region."""
    found: set[Any] = set()
    stack = list(narrow)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack += [user for user, which in readers.get(node, ()) if not _is_wide(node, which)]
        stack += [
            following
            for following, which in node.next_functions
            if _is_elsewhere(following, inside) and not _is_wide(following, which)
        ]
    for t in starts:
        if t.grad_fn in found and t.dtype not in _WIDE:
            raise ScaledGradientError(
                f"backward was called on a tensor in {t.dtype}, made outside from an activation inside of a "
                "switched model: its gradient cannot be scaled in 16 bits. Make the loss FP32: loss.float()"
            )
    return found


def _scale_whole(node: Any, gate: Gate, inside: Intervals, drawn_in: set[Any]) -> None:
    """Have ``node`` compute with gradients times the scale, and give those that go elsewhere over it."""
    mended: set[Any] = node.metadata.setdefault("halfstep", set())
    if "whole" not in mended:
        mended.add("whole")
        multiplied = [_is_wide(node, which) for which in range(len(node._input_metadata))]

        def before(given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            pairs = zip(given, multiplied, strict=True)
            return tuple(_enter_by(gate, g) if times else g for g, times in pairs)

        node.register_prehook(before)
    for k, (following, which) in enumerate(node.next_functions):
        if following is None:
            continue
        if _is_elsewhere(following, inside):
            if following in drawn_in and not _is_wide(following, which):
                continue
        elif getattr(following, "variable", None) is None and not isinstance(following, OUTWARD):
            continue  # inside
        _mend(node, k, functools.partial(_divide_by, gate))


_WIDE = (torch.float32, torch.float64)


def _is_elsewhere(node: Any, inside: Intervals) -> bool:
    """True for a node of a computation outside of the region: neither leaf nor boundary."""
    if node is None or isinstance(node, OUTWARD) or getattr(node, "variable", None) is not None:
        return False
    return node._sequence_nr() not in inside


def _is_wide(node: Any, which: int) -> bool:
    """True where result ``which`` of ``node`` is in FP32 or FP64."""
    return node._input_metadata[which].dtype in _WIDE


def _check_entry(node: Any, user: str, gate: Gate, inside: Intervals) -> None:
    if isinstance(node, INWARD) and node.gate is gate:
        raise ScaledGradientError(
            f"a working copy that was read inside a switched model is used outside of it by {user}: "
            "its gradient would be divided by a loss scale that it was never multiplied by. Outside "
            "of forward read the parameter itself, or pass the copy through switch.outside(...)"
        )
    if node._sequence_nr() in inside:
        raise ScaledGradientError(
            f"an activation made inside a switched model (the result of {node.name()}) is {user}: its "
            "gradient would enter the region without the loss scale. Return the activation from forward as "
            "part of the output, or pass it through switch.outside(activation) where it is captured"
        )


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
