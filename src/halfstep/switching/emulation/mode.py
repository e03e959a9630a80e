"""The dispatch mode: every operation of a program, forward and backward, in the recipe's numbers.

One operation, FP32 carriers in and out::

    forward:   its result is rounded to the store format if the policy writes it there: always for a dot
               product; for others where all of its operands are (what torch's type promotion would say)
    backward:  its result is rounded if what the node's forward gave was, since a gradient has the format
               of what it is the gradient of
    a single number (a loss, a norm, a clip factor) is wide

Point-wise operations of a store format that torch has a dtype for run in torch's own kernel of that dtype:
their results are torch's, bit for bit. All else computes in FP32 and is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from halfstep.format import Accumulator
from halfstep.recipe import Recipe, Treatment, is_wide_node
from halfstep.switching.emulation.call import NO_KERNEL, Call
from halfstep.switching.emulation.numbers import (
    ACTIVATION,
    CARRIERS,
    GRADIENT,
    LOW,
    ROLES,
    WEIGHT,
    WIDE,
    Marks,
    Numbers,
    to,
)
from halfstep.switching.emulation.operations import Operation
from halfstep.switching.emulation.products import product
from halfstep.switching.products import FP32_SUMS, wide_product

__all__ = ["EmulationMode"]

_ACCUMULATE = "torch::autograd::AccumulateGrad"
# Nodes whose backward rounds by itself: see `halfstep.switching.recurrent` and `.boundary`.
_OWN_NODES = frozenset(("_LayerBackward", "_EnterBackward", "_LeaveBackward", "_RowsBackward"))
_MARK = "halfstep.low"
_HOOKED = "halfstep.wide"
_FP32, _STRIDED = torch.float32, torch.strided
_DETACH = torch.ops.aten.detach.default


try:
    from torch._C._dynamo.eval_frame import (
        _FrameAction,
        _FrameExecStrategy,
        set_code_exec_strategy,
    )
except ImportError:  # a torch that keeps its compiler otherwise: a mode gets what torch gives it
    _hidden = None
else:
    _hidden = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)


class EmulationMode(TorchDispatchMode):
    """Runs what is dispatched under it in ``recipe``; one object may be on the stacks of several threads."""

    def __init__(self, recipe: Recipe, accumulate: Accumulator, serial: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.marks = Marks(serial)
        self.numbers = Numbers(recipe)
        self.accumulate = FP32_SUMS if accumulate == FP32_SUMS else accumulate
        self.operations: dict[int, Operation] = {}
        self._wide_nodes: dict[str, bool] = {}
        self.is_paused: Callable[[], bool] = bool
        """True where operations run as they are: the optimizer's, where it is FP32."""
        self.scale: Callable[[], float] = lambda: 1.0
        """The loss scale, asked for in a backward."""
        self.creates_graph: Callable[[], bool] = bool
        """True in a backward that is recorded."""
        self.stores_all = recipe.policy.store_all
        self._plain = recipe.optimizer.name != "fp32"
        self._identity = recipe.is_identity
        self.masters_wide = recipe.master.name == "fp32"
        self._limit = float(recipe.store.max)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch is not to wrap the method below in ``torch._dynamo.disable``.

        That takes the compiler in, for a second, and 1 us a call. The compiler is told below.
        """
        return _hidden is None

    # -- every operation ----------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._identity and self.is_paused():
            return func(*args, **kwargs)
        it = self.operations.get(id(func)) or self.operation(func)
        it.count += 1
        for t in types:
            if t not in _PLAIN:
                return NotImplemented  # a subclass takes itself apart; its parts come here
        kind = it.kind
        if self._identity:
            return func(*args, **kwargs)
        if kind is Treatment.VIEW:
            return self._view(it, args, kwargs)
        if kind is Treatment.FREE:
            return func(*args, **kwargs)
        node = torch._C._current_autograd_node()
        if node is not None:
            name = node.name()
            if name == _ACCUMULATE and self.masters_wide:
                return self._accumulate(func, args, kwargs)
            if name in _OWN_NODES:
                it.count -= 1  # a part of what was counted in the forward
                return func(*args, **kwargs)
            if torch.is_grad_enabled() and not self.creates_graph():
                node = None  # a forward that runs again inside a backward: checkpointing
        if it.is_dot and node is not None and self._is_wide_node(name):
            kind = Treatment.WIDE
        elif it.is_dot and not kwargs:
            product = _PRODUCTS.get(it.text)
            made = product(self, args, node is not None) if product else None
            if made is not None:
                return made
        call = Call(self, it, args, kwargs, node)
        if call.is_left_alone:
            out = func(*args, **kwargs)
            beside = call.zero_dim and self.stores_all and kind is not Treatment.MAKE
            if beside and isinstance(out, Tensor) and out.dtype in CARRIERS:
                self.set_marks(out, ACTIVATION | WIDE)  # single numbers, side by side
            if call.singles and kind is not Treatment.MAKE:
                call.pass_on(out)
            return out
        return _HANDLERS[kind](self, call)

    def operation(self, func: torch._ops.OpOverload) -> Operation:
        """What is known of ``func`` here: its class and how often it was seen."""
        it = self.operations.get(id(func))  # it keeps ``func``, whose hash is slow
        if it is None:
            it = self.operations[id(func)] = Operation(func, self.recipe.policy)
        return it

    def _is_wide_node(self, name: str) -> bool:
        """True in the backward of an operation that computes in FP32: of a matrix inverse, it is products."""
        if name not in self._wide_nodes:
            self._wide_nodes[name] = not self._plain and is_wide_node(self.recipe.policy, name)
        return self._wide_nodes[name]

    def _accumulate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gradients of leaves are FP32, as the masters are."""
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.dtype in CARRIERS:
            self.set_marks(out, self.leaf_marks)
        return out

    @property
    def leaf_marks(self) -> int:
        """The marks of a gradient outside of the backward."""
        return GRADIENT | (WIDE if self.stores_all else 0)

    def _view(self, it: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        t = args[0] if args else None
        if isinstance(t, Tensor) and t.dtype in CARRIERS and t.layout is torch.strided:
            marks = self.marks.of(t)
            if not marks & ROLES and isinstance(t, nn.Parameter):
                marks = self.met(t, marks)
            if not self.stores_all and t.requires_grad:
                self.remember(t, marks)
            if it.op is _DETACH and self.masters_wide:
                node = torch._C._current_autograd_node()
                if node is not None and node.name() == _ACCUMULATE:
                    self.marks.set(t, self.leaf_marks)  # what p.grad becomes
        return it.run(*args, **kwargs)

    def seen(self, t: Tensor, backward: bool) -> int:
        """The marks of a carrier; one that has no role gets the one that it has here."""
        marks = self.marks.of(t)
        if marks & ROLES:
            return marks
        if isinstance(t, nn.Parameter):
            return self.met(t, marks)
        marks |= GRADIENT if backward else ACTIVATION
        self.marks.set(t, marks)
        return marks

    def met(self, weight: Tensor, marks: int) -> int:
        """The marks of a parameter; one that the recipe does not keep in FP32 is rounded where it is met."""
        if marks & ROLES:
            return marks
        marks = WEIGHT
        if not self.masters_wide:
            # ``.data`` and ``detach()`` come here above autograd
            with torch._C._AutoDispatchBelowAutograd():
                weight.copy_(self.numbers.master(weight))
            marks |= LOW if self.recipe.master == self.recipe.store else 0
        self.marks.set(weight, marks)
        return marks

    def store(self, t: Tensor) -> None:
        """Round ``t`` to the store format where it is, as a tensor of that dtype would be."""
        if t.dtype in CARRIERS and t.dim() and not self.marks.of(t) & (LOW | WEIGHT):
            t.copy_(self.numbers.stored(t))
            self.marks.set(t, ACTIVATION | LOW)

    def remember(self, t: Tensor, marks: int) -> None:
        """Note at ``t``'s node whether its gradient is of the store format.

        Where ``t`` is wide and was made of what is not, its node's backward ends in a cast, as autocast's.
        """
        if not t.requires_grad:
            return
        node = t.grad_fn
        if node is None:
            return
        noted: Any = node.metadata
        if marks & LOW:
            noted[_MARK] = True
            return
        if _HOOKED in noted:
            return
        below: Any = [fn.metadata if fn is not None else {} for fn, _ in node.next_functions]
        low = tuple(_MARK in metadata for metadata in below)
        if any(low):
            noted[_HOOKED] = True
            node.register_hook(lambda given, _: self._leave_wide(given, low))

    def _leave_wide(
        self, gradients: tuple[Tensor | None, ...], low: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...] | None:
        """The gradients that a wide node hands on, rounded where what they are of is."""
        if torch.is_grad_enabled():
            return None  # recorded: rounded where they are read

        def rounded(t: Tensor | None, is_low: bool) -> Tensor | None:
            if t is None or not is_low or t.dtype not in CARRIERS or not t.dim():
                return t
            if t.layout is not torch.strided or self.marks.of(t) & LOW:
                return t
            with _disable_current_modes():
                t = self.numbers.stored(t, self.scale())
            self.marks.set(t, GRADIENT | LOW)
            return t

        return tuple(rounded(t, k) for t, k in zip(gradients, low, strict=False))

    def is_low_node(self, node: Any) -> bool:
        """True in the backward of something that was written in the store format."""
        return self.stores_all or _MARK in node.metadata

    def set_marks(self, t: Tensor, marks: int) -> None:
        """Mark a result; a single number has none."""
        if t.layout is torch.strided and t.dim():
            self.marks.set(t, marks)

    # -- kinds --------------------------------------------------------------------------------------

    def _looked(
        self, tensors: tuple[Tensor, ...], backward: bool
    ) -> tuple[list[int], int, float] | None:
        """Of a product: its tensors' marks, its role, the scale; None if not all are plain FP32."""
        for t in tensors:
            if t.dtype is not _FP32 or t.layout is not _STRIDED:
                return None
        known = [self.seen(t, backward) for t in tensors]
        role, scale = ACTIVATION, 1.0
        if (known[0] | known[1] | known[-1]) & GRADIENT:
            role, scale = GRADIENT, self.scale()
        if not (backward or self.stores_all):
            for t, marks in zip(tensors, known, strict=True):
                if t.requires_grad and not (self.masters_wide and marks & WEIGHT):
                    self.remember(t, marks)
        return known, role, scale

    def _matrix_product(self, args: tuple[Any, ...], backward: bool) -> Tensor | None:
        """What `_dot` gives for FP32 matrices and perhaps a bias, at less cost; None where it takes more."""
        looked = self._looked(args, backward)
        *bias, a, b = args
        if looked is None or (bias and bias[0].dim() != 1):
            return None
        known, role, scale = looked
        if scale != 1.0 and self.accumulate is not FP32_SUMS:
            return None  # which sums what the scaled program has
        of_bias, of_a, of_b = known[0], known[-2], known[-1]
        numbers = self.numbers
        reads = numbers.reads
        made = wide_product(
            reads[of_a & (ROLES | LOW)](a, -1, scale if of_a & GRADIENT else 1.0),
            reads[of_b & (ROLES | LOW)](b, -2, scale if of_b & GRADIENT else 1.0),
            self.accumulate,
        )
        if made.dtype is not _FP32:
            return None  # a sum of more digits
        if scale == 1.0 and not (bias and of_bias & WIDE):
            made = numbers.store(made, bias[0] if bias else None)
        else:
            for t in bias:
                low = of_bias & (LOW | WIDE)
                made.add_(t if low else numbers.stored(t, scale if of_bias & GRADIENT else 1.0))
            made = numbers.stored(made, scale)
        self.marks.set(made, role | LOW)
        return made

    def _convolution(self, args: tuple[Any, ...], backward: bool) -> Tensor | None:
        """As `_matrix_product`, of a forward convolution that is summed in FP32."""
        x, weight, bias, *geometry = args
        looked = self._looked(args[:2] if bias is None else args[:3], backward)
        if looked is None or looked[2] != 1.0 or self.accumulate is not FP32_SUMS:
            return None
        known, role, _ = looked
        numbers = self.numbers
        if bias is not None and not known[2] & (LOW | WIDE):
            bias = numbers.stored(bias)
        x = numbers.plane(x, known[0], 1)
        weight = numbers.kernel(weight, known[1], 0 if geometry[3] else 1)
        # half of the time of a call of torch.ops.aten.convolution
        made = numbers.store(torch.convolution(x, weight, bias, *geometry), None)
        self.marks.set(made, role | LOW)
        return made

    def _dot(self, call: Call, summed: tuple[int | None, ...] = ()) -> Any:
        """Its operands rounded along the axes ``summed``, one that is None not at all; the sum rounded."""
        numbers, it = self.numbers, call.it
        wanted = torch.float64 if call.has_double else torch.float32
        gradients = 0
        if it.name == "convolution_backward" and not summed:
            return self._convolution_backward(call)
        ways: Iterator[Any] = iter(())
        if it.name in ("convolution", "_convolution"):
            ways = iter((numbers.plane, numbers.kernel))
            summed = (1, 0 if call.args[6] and self.accumulate is FP32_SUMS else 1)
        elif it.name == "convolution_backward":
            ways = iter((numbers.plane, numbers.plane, numbers.kernel))
        dims = iter(summed or it.summed)

        def operand(t: Tensor) -> Tensor:
            nonlocal gradients
            dim, read = next(dims, -1), next(ways, numbers.operand)
            if dim is None or not t.dim():
                return to(t, torch.float32)
            marks = call.marks_of(t)
            if not marks & GRADIENT:
                return to(read(t, marks, max(dim, -t.dim())), torch.float32)
            gradients += 1
            rounded = to(read(t, marks, max(dim, -t.dim()), call.scale), torch.float32)
            return rounded * call.scale if scaled else rounded

        # A narrow accumulator sums what the scaled program has; to an FP32 one a scale is all the same.
        scaled = call.scale != 1.0 and self.accumulate is not FP32_SUMS
        args, kwargs = call.mapped(operand)
        if it.name.startswith(("add", "baddbmm")):  # what is added to is no operand: a bias
            bias = to(call.rounded(call.args[0]), torch.float32)
            args = (bias * call.scale**gradients if scaled else bias, *args[1:])
        if it.name.endswith("convolution") and len(args) > 2 and args[2] is not None:
            args = (*args[:2], to(call.rounded(call.args[2]), torch.float32), *args[3:])
        if not (it.writes or it.outs):
            made = product(it.op, it.name, args, kwargs, self.accumulate)
            if scaled:
                made = _divided(made, call.scale**gradients)
            return call.results(made, wanted=wanted)
        name = it.name.removesuffix("_")
        kwargs = {k: v for k, v in kwargs.items() if k not in it.outs}
        made = product(getattr(torch.ops.aten, name).default, name, args, kwargs, self.accumulate)
        target = call.args[0] if it.writes else call.kwargs[it.outs[0]]
        if target.shape != made.shape:
            target.resize_(made.shape)
        target.copy_(made)
        call.results(target)
        return target

    def _convolution_backward(self, call: Call) -> Any:
        """Its products as the switch has them: each along its own axis; one rounding for both where one does.

        Sums that are not FP32's have blocks along the channels in both. A bias is no operand: its gradient is
        the sum of a gradient in the store format.
        """
        numbers = self.numbers
        *args, (of_x, of_w, of_bias) = call.args
        if numbers.gradient_is_stored and numbers.ignores_axes:
            return self._dot(call, (1, 1, 1))
        found: list[Any] = [None, None, None]
        parts: list[tuple[tuple[bool, ...], tuple[int | None, ...]]] = [((of_x, of_w), (1, 1, 1))]
        if self.accumulate is FP32_SUMS and not numbers.ignores_axes:
            outputs = 1 if call.args[7] else 0
            parts = [((of_x, False), (1, None, outputs)), ((False, of_w), (0, 0, None))]
        for mask, summed in parts:
            if any(mask):
                part = Call(self, call.it, (*args, [*mask, False]), call.kwargs, call.node)
                for k, t in enumerate(self._dot(part, summed)):
                    found[k] = found[k] if t is None else t
        if of_bias:
            grad = call.rounded(args[0])
            found[2] = call.results(grad.sum([0, *range(2, grad.dim())]))
        return tuple(found)

    def _move(self, call: Call) -> Any:
        low = call.all_low
        rounds = low and (call.has_numbers or call.zero_dim or not call.all_marked)
        args, kwargs = call.args, call.kwargs
        if low and (call.has_numbers or call.zero_dim) and self._limit < math.inf:
            args, kwargs = call.saturated(self._limit)
        return call.results(call.run(args, kwargs), low=low, rounds=rounds)

    def _make(self, call: Call) -> Any:
        out = call.run(call.args, call.kwargs)
        source = call.floats[0] if call.floats else None
        if source is not None and call.kwargs.get("dtype") is None and not self.stores_all:
            return call.results(out, low=bool(call.marks_of(source) & LOW))
        return out

    def _cast(self, call: Call) -> Any:
        out = call.run(call.args, call.kwargs)
        source = call.floats[0]
        if source.dim() and out.dtype in CARRIERS:
            marks = call.marks_of(source)
            asked = call.kwargs.get("dtype") is not None and out.dtype is not source.dtype
            self.marks.set(out, marks & ~LOW if asked and not self.stores_all else marks)
        return out

    def _norm(self, call: Call) -> Any:
        """Activation in, activation out; what else is read and written is FP32."""
        backward = call.it.name.endswith("backward")
        low = call.is_low(call.args[1 if backward else 0])
        activations = 2 if backward else 1
        args = (*(call.rounded(a) for a in call.args[:activations]), *call.args[activations:])
        out = call.run(args, call.kwargs)
        wide = () if backward and self.stores_all else range(1, 9)
        return call.results(out, low=low, wide=wide, keeps=True)

    def _wide(self, call: Call) -> Any:
        if self._plain and call.it.pointwise:
            return self._own(call)
        args, kwargs = call.mapped(call.rounded)
        low = self.is_low_node(call.node) if call.node is not None else self.stores_all
        return call.results(call.run(args, kwargs), low=low, wide=call.it.wide, keeps=True)

    def _own(self, call: Call) -> Any:
        it = call.it
        if (
            call.all_low
            and self.numbers.dtype is not torch.float32
            and not (it.no_kernel or it.lists)
            and (call.scale == 1.0 or call.is_linear)
        ):
            out = call.native()
            if out is not NO_KERNEL:
                return out
        return self._rounded_once(call)

    def _rounded_once(self, call: Call) -> Any:
        args, kwargs = call.mapped(call.rounded)
        return call.results(call.run(args, kwargs), low=call.all_low)


def _divided(made: Any, scale: float) -> Any:
    if isinstance(made, Tensor):
        return made / scale
    return tuple(None if t is None else t / scale for t in made)


if _hidden is not None:
    set_code_exec_strategy(EmulationMode.__torch_dispatch__.__code__, _hidden)

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

# The commonest dot products, with less ado than `_dot`.
_PRODUCTS: dict[str, Callable[[EmulationMode, tuple[Any, ...], bool], Tensor | None]] = {
    "aten.mm.default": EmulationMode._matrix_product,
    "aten.addmm.default": EmulationMode._matrix_product,
    "aten.convolution.default": EmulationMode._convolution,
}

_HANDLERS: dict[Treatment, Callable[[EmulationMode, Call], Any]] = {
    Treatment.MOVE: EmulationMode._move,
    Treatment.MAKE: EmulationMode._make,
    Treatment.CAST: EmulationMode._cast,
    Treatment.RANDOM: EmulationMode._rounded_once,
    Treatment.DOT: EmulationMode._dot,
    Treatment.LOOK_UP: EmulationMode._rounded_once,
    Treatment.NORM: EmulationMode._norm,
    Treatment.WIDE: EmulationMode._wide,
    Treatment.SUM: EmulationMode._rounded_once,
    Treatment.OWN: EmulationMode._own,
    Treatment.UNKNOWN: EmulationMode._rounded_once,
}
