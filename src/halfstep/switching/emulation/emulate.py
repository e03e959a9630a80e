"""``halfstep.emulate``: a whole program in a recipe, with no switch and no model object."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingModuleSource]
    is_functorch_wrapped_tensor,
)
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from halfstep.format import BlockFormat
from halfstep.recipe import Recipe, ScalingKind, Treatment
from halfstep.switching import engine
from halfstep.switching.boundary import enter, leave
from halfstep.switching.emulated import Emulator
from halfstep.switching.emulation import surroundings
from halfstep.switching.emulation.allowed import check, explain
from halfstep.switching.emulation.mode import EmulationMode
from halfstep.switching.emulation.numbers import ACTIVATION, CARRIERS, LOW, ROLES
from halfstep.switching.emulation.summary import EmulationSummary
from halfstep.switching.explanation import Explanation
from halfstep.switching.guard import Guard
from halfstep.switching.ledger import Ledger
from halfstep.switching.loss_scale import StepReport
from halfstep.switching.ranks import Ranks
from halfstep.switching.recurrent import recurrent_layers
from halfstep.switching.script_precision import ScriptPrecision

__all__ = ["Emulation", "emulate"]

F_ = TypeVar("F_", bound=Callable[..., Any])
_serials = itertools.count(1)


class _Local(threading.local):
    """What is true of one thread."""

    def __init__(self) -> None:
        self.active: list[Emulation] = []
        self.paused = 0
        self.steps: list[types.FrameType] = []
        self.records = False


_local = _Local()
_forgotten = False


def _forget() -> None:
    """A forked process (a data loader's worker) computes as it would without an emulation."""
    global _forgotten
    _forgotten = True


os.register_at_fork(after_in_child=_forget)


def emulate(recipe: object = "fp16-naive") -> Emulation:
    """A context (or decorator) in which every torch operation computes in ``recipe``'s arithmetic.

    Forward, backward and, where the recipe says so, the optimizer: whatever the program is made of, with
    nothing to be switched. Tensors keep the dtype that the program gave them; their values are those of the
    recipe's formats. Point-wise operations give what torch's own kernels of the store format give, bit for
    bit, where torch has that dtype; dot products have the recipe's operands and accumulator and are rounded
    once. A single number (a loss, a norm) is not rounded. Where the recipe keeps FP32 masters, parameters
    and their gradients are FP32 and ``optimizer.step()`` runs as it is; a loss scale is multiplied in before
    each rounding of a gradient and divided out after it, so it is never seen.

    Outside of the context the program computes as before; weights keep what they have learnt.

    Args:
        recipe: a name of ``halfstep.recipes()``, one of their synonyms, a text form, or a `Recipe`.

    Raises:
        UnknownNameError: the recipe has no such name; near ones are suggested.
        FormatError: its accumulator cannot add products of its operands.
        SwitchError: it treats modules by their names or places.

    >>> import torch, halfstep
    >>> with halfstep.emulate("fp16-naive") as emulation:
    ...     x = torch.full((3,), 2048.0)
    ...     (x + 1).tolist()
    [2048.0, 2048.0, 2048.0]
    >>> emulation.operations["own"]
    {'aten.add.Tensor': 1}

    Source: the rule of the arithmetic is the switch's; see docs/emulation.md.
    """
    return Emulation(Recipe.parse(recipe))


class Emulation(contextlib.ContextDecorator):
    """A recipe on a whole program: what was seen of it, and its loss scale."""

    def __init__(self, recipe: Recipe) -> None:
        check(recipe)
        self.recipe = recipe
        accumulate = recipe.accumulate
        if not recipe.adds_in_fp32:
            formats = (recipe.activation, recipe.weight)
            left, right = (f.element if isinstance(f, BlockFormat) else f for f in formats)
            accumulate = accumulate.of(left, right)
        self.guarded = recipe.guarded and not recipe.is_identity
        self.ledger = Ledger(recipe.loss_scaling, False, recipe.largest_gradient)
        self._mode = EmulationMode(recipe, accumulate, next(_serials))
        self._mode.is_paused = self._is_paused
        self._mode.scale = self._scale_now
        self._mode.creates_graph = lambda: _local.records
        numbers = self._mode.numbers
        self._emulator = Emulator(numbers.dtype, accumulate)
        self._exempt = recipe.optimizer.name == "fp32"
        self._scaled = recipe.loss_scaling.kind is not ScalingKind.NONE
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._guards: dict[int, Guard] = {}
        self._undo: list[Callable[[], None]] = []
        self._entered = 0
        self._lock = threading.RLock()
        self._precision = ScriptPrecision(lambda: self._scaled)
        self._named: set[str] = set()
        self._scales: set[float] = set()
        self.ledger.reports.subscribe(lambda report: self._scales.add(report.loss_scale))

    # -- on and off ---------------------------------------------------------------------------------

    def __enter__(self) -> Emulation:
        with self._lock:
            if not self._entered:
                self._install()
            self._entered += 1
        self._push()
        return self

    def __exit__(self, *error: object) -> None:
        self._pop()
        with self._lock:
            self._entered -= 1
            if not self._entered:
                while self._undo:
                    self._undo.pop()()
                for guard in self._guards.values():
                    guard.leave(self)
                self._guards.clear()
        self._warn()

    def _push(self) -> None:
        # An emulation inside another takes its place; inside itself it is there already.
        if self not in _local.active:
            self._mode.__enter__()
        _local.active.append(self)

    def _pop(self) -> None:
        _local.active.pop()
        if self not in _local.active:
            self._mode.__exit__(None, None, None)

    @contextlib.contextmanager
    def _thread(self) -> Iterator[None]:
        self._push()
        try:
            with self._without_autocast():
                yield
        finally:
            self._pop()

    @contextlib.contextmanager
    def _without_autocast(self) -> Iterator[None]:
        with contextlib.ExitStack() as opened:
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                opened.enter_context(self._precision.forbidden(device))
            yield

    def _install(self) -> None:
        numbers = self._mode.numbers
        self._precision.install()
        self._undo = [self._precision.remove]
        if self.recipe.is_identity:
            return
        quiet = self._without_autocast()
        quiet.__enter__()
        self._undo += [
            lambda: quiet.__exit__(None, None, None),
            surroundings.forbid_fused_attention(),
            surroundings.patch_threads(self._thread),
            engine.install(self._before_backward),
            surroundings.patch_engine(self._backward, self._returned),
            surroundings.patch_recurrent(self._recurrent),
            register_optimizer_step_pre_hook(self._before_step).remove,
            register_optimizer_step_post_hook(self._after_step).remove,
        ]
        if not self.recipe.policy.store_all and not numbers.identity:
            self._undo.append(surroundings.patch_float(self._widened))
        if self._scaled:
            self._optimizers.update(o for o in gc.get_objects() if Optimizer in type(o).__mro__)
            self._undo.append(self._patch_optimizers())

    # -- the mode's questions -----------------------------------------------------------------------

    def _is_paused(self) -> bool:
        if _local.paused or _forgotten:
            return True
        if _local.active and _local.active[-1] is not self:
            return True
        return bool(_local.steps) and _is_running_step()

    def _scale_now(self) -> float:
        if torch._C._current_graph_task_id() != -1:
            self.ledger.note_backward()
        return self.ledger.gate.scale

    # -- the backward -------------------------------------------------------------------------------

    def _before_backward(self, roots: tuple[Tensor, ...], wanted: tuple[Any, ...]) -> None:
        if self._is_paused():
            return
        if self._scaled and not self.ledger.scaled:
            self._scale_where_steps_are_skipped()
        if self.recipe.policy.store_all:
            return
        for root in roots:
            if is_functorch_wrapped_tensor(root):
                continue
            if root.dtype in CARRIERS and root.dim() and root.layout is torch.strided:
                self._mode.remember(root, self._mode.marks.of(root))

    @contextlib.contextmanager
    def _backward(self, records: bool) -> Iterator[None]:
        before, _local.records = _local.records, records
        try:
            yield
        finally:
            _local.records = before
            self.ledger.gate.gave |= records

    def _returned(self, t: Tensor) -> None:
        """Gradients that a program asks for are FP32, as those of its leaves are."""
        self.ledger.gate.gave = True
        if is_functorch_wrapped_tensor(t):
            return
        if self._mode.masters_wide and t.dtype in CARRIERS and not self._is_paused():
            self._mode.set_marks(t, self._mode.leaf_marks)

    # -- the optimizer ------------------------------------------------------------------------------

    def _patch_optimizers(self) -> Callable[[], None]:
        """Notice the optimizers that are made."""
        original = Optimizer.add_param_group

        @functools.wraps(original)
        def add_param_group(optimizer: Optimizer, param_group: dict[str, Any]) -> None:
            original(optimizer, param_group)
            self._optimizers.add(optimizer)

        Optimizer.add_param_group = add_param_group  # pyright: ignore[reportAttributeAccessIssue]

        def undo() -> None:
            Optimizer.add_param_group = original

        return undo

    def _scale_where_steps_are_skipped(self) -> None:
        """Scale 1 until an optimizer holds a parameter of the program: no one else would skip a step."""
        for optimizer in list(self._optimizers):
            for group in optimizer.param_groups:
                if any(
                    p.layout is torch.strided and self._mode.marks.of(p) for p in group["params"]
                ):
                    self.ledger.scaled = True
                    self.ledger.set(self.ledger.loss_scale)
                    return

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> Any:
        if not _local.active or _local.active[-1] is not self:
            return None
        if self.guarded and id(optimizer) not in self._guards:
            self._guards[id(optimizer)] = Guard.over(optimizer, self)
        if not self._exempt:
            return None
        _local.steps.append(sys._getframe(1))
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None

        def emulated() -> Any:
            steps, _local.steps = _local.steps, []
            try:
                return closure()
            finally:
                _local.steps = steps

        if len(args) > 1:
            return (args[0], emulated, *args[2:]), kwargs
        return args, {**kwargs, "closure": emulated}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.guarded and _local.active and _local.active[-1] is self:
            self.ledger.steps += 1  # none is looked at, and none skipped
        if _local.steps and _local.steps[-1] is sys._getframe(1):
            _local.steps.pop()

    # -- what a guard asks --------------------------------------------------------------------------

    def names(self) -> dict[int, str]:
        """No model, no names: parameters are told by their places in the optimizer."""
        return {}

    def defers(self) -> bool:
        """A step's outcome is known when it has been made."""
        return False

    def ranks(self) -> Ranks:
        """Gradients are looked at by each process alone: DDP has summed them before."""
        return Ranks()

    def before_step(self, optimizer: Optimizer) -> None:
        """State is as the optimizer keeps it."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Round weights that the recipe does not keep in FP32."""
        if self._mode.masters_wide:
            return
        with torch.no_grad():
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if p.dtype in CARRIERS:
                    p.copy_(self._mode.numbers.master(p))

    # -- layers and casts that are met above autograd -----------------------------------------------

    def _recurrent(self, op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
        """A recurrent layer as the switch has it, where torch has the recipe's dtype."""
        recipe = self.recipe
        reads_by_role = recipe.reads_by_role
        low, gate = self._emulator.low, self.ledger.gate
        packed = op._overloadname == "data"
        x, weights = args[0], args[2 + packed]
        layers = args[4 + packed] * (2 if args[7 + packed] else 1)
        projected = len(weights) // layers not in (2, 4)
        if self._is_paused() or x.dtype is not torch.float32:
            return NotImplemented
        if low is torch.float32 or reads_by_role or projected:
            hx = args[1 + packed]
            for t in hx if isinstance(hx, (list, tuple)) else (hx,):
                if not t.requires_grad:  # states of zeros are of no format yet
                    with torch.no_grad():
                        self._mode.store(t)
            return NotImplemented
        _local.paused += 1
        try:
            with torch.no_grad():
                for weight in weights:
                    self._mode.met(weight, self._mode.marks.of(weight))

            def inside(t: Any) -> Any:
                if isinstance(t, (list, tuple)):
                    return [inside(v) for v in t]
                floats = isinstance(t, Tensor) and t.dtype is torch.float32
                return enter(t, gate, low) if floats else t

            outs = recurrent_layers(self._emulator, op, *(inside(a) for a in args))
            outs = tuple(leave(out, gate, torch.float32) for out in outs)
        finally:
            _local.paused -= 1
        layer = self._mode.operation(op)
        layer.kind = Treatment.DOT  # met above the dispatch modes, so in no list of what they see
        layer.count += 1
        for out in outs:
            self._mode.set_marks(out, ACTIVATION | LOW)
        return outs

    def _widened(self, t: Tensor) -> Tensor | None:
        """``t.float()`` where ``t`` is of the store format: the same numbers, to be computed with in FP32."""
        if t.dtype is not torch.float32 or t.layout is not torch.strided or not t.dim():
            return None
        mode = self._mode
        if is_functorch_wrapped_tensor(t):
            return None
        if self._is_paused() or not mode.marks.of(t) & LOW:
            return None
        wide = t.clone()
        mode.set_marks(wide, mode.marks.of(t) & ROLES)
        return wide

    # -- what a user asks ---------------------------------------------------------------------------

    @property
    def operations(self) -> dict[str, dict[str, int]]:
        """How often each operation was seen, by class, the commonest first."""
        found: dict[str, dict[str, int]] = {}
        seen = sorted(self._mode.operations.values(), key=lambda it: (-it.count, it.text))
        for kind in Treatment:
            counts = {it.text: it.count for it in seen if it.kind is kind and it.count}
            if counts:
                found[kind.value] = counts
        return found

    @property
    def unknown(self) -> tuple[str, ...]:
        """Operations that no list knows: they computed in FP32 and were rounded once."""
        return tuple(self.operations.get(Treatment.UNKNOWN.value, ()))

    @property
    def loss_scale(self) -> float:
        """The loss scale that the next backward will use."""
        return self.ledger.gate.scale

    @property
    def last_step(self) -> StepReport:
        """What became of the last ``optimizer.step()``."""
        return self.ledger.last_step()

    def summary(self) -> EmulationSummary:
        """What was seen so far, in numbers."""
        return EmulationSummary(
            recipe=str(self.recipe),
            operations=self.operations,
            steps=self.ledger.steps,
            skipped_steps=self.ledger.skipped_steps,
            loss_scales=(min(self._scales, default=1.0), max(self._scales, default=1.0)),
            unknown=() if self.recipe.is_identity else self.unknown,
            autocast=self._precision.autocast,
            grad_scaler=self._precision.grad_scaler and self._scaled,
        )

    def explain(self) -> Explanation:
        """A table: what is done with each class of operations in this recipe."""
        return explain(self.recipe, native=self._mode.numbers.dtype is not torch.float32)

    def _warn(self) -> None:
        new = [name for name in self.unknown if name not in self._named]
        if new and not self.recipe.is_identity:
            self._named.update(new)
            warnings.warn(
                f"halfstep.emulate: in no list, so computed in FP32 and rounded once: {', '.join(new)}",
                RuntimeWarning,
                stacklevel=3,
            )


def _is_running_step() -> bool:
    """True inside of an optimizer's step; one that raised is forgotten."""
    while _local.steps:
        try:
            _local.steps[-1].clear()
        except RuntimeError:  # it is executing
            return True
        _local.steps.pop()
    return False
