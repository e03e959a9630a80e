"""``halfstep.switch``: mixed precision on, in place, with nothing else of the training loop to change."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from halfstep.errors import OperandError, SwitchError
from halfstep.recipe import Recipe, ScalingKind
from halfstep.switching import engine, graphs, hooks, overrides, unlisted
from halfstep.switching.admission import device_of, optimizers_in, uncompiled
from halfstep.switching.adoption import Shape, adopt, check_not_switched, release, working_dtypes
from halfstep.switching.audit import Audited
from halfstep.switching.between_steps import BetweenSteps
from halfstep.switching.boundary import Gate, enter, leave
from halfstep.switching.checkpoints import Checkpointed
from halfstep.switching.communication import compress
from halfstep.switching.explanation import Explanation
from halfstep.switching.graph_walk import (
    Intervals,
    Schedule,
    check_wanted,
    has_left,
    is_backward_of,
    is_outside,
    mend_forward,
    mend_roots,
)
from halfstep.switching.guard import Guard, watch_steps
from halfstep.switching.ledger import Ledger
from halfstep.switching.loss_scale import StepReport
from halfstep.switching.machinery import Machinery
from halfstep.switching.met import Met
from halfstep.switching.module_hooks import call_leaving, has_hooks_after_forward
from halfstep.switching.naming import parameter_names
from halfstep.switching.plain import become_narrow
from halfstep.switching.plan import Plan, make_plan
from halfstep.switching.ranks import Ranks, active_ddp, is_part_of, ranks_of
from halfstep.switching.region import (
    SMALL,
    Buckets,
    Region,
    check_unwritten,
    current,
    graph_shape,
)
from halfstep.switching.replay import Recorder, locator
from halfstep.switching.reports import Handle, pace
from halfstep.switching.roles import Roles
from halfstep.switching.speeds import explained
from halfstep.switching.state import State, read_state, write_state
from halfstep.switching.structure import has_graph, map_tensors, tensors_in

__all__ = ["Switch", "switch"]

_NARROW = (torch.float16, torch.bfloat16)


def switch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    recipe: object = "fp16",
) -> Switch:
    """Train ``model`` in mixed precision from now on; returns the `Switch`, to look at and to undo.

    Nothing else changes: ``loss.backward()``, clipping, ``optimizer.step()``, schedulers and
    ``state_dict()`` are written as in FP32. Inside the model's forward, and the backward of just those
    operations, tensors are in 16 bits, dot products add in FP32, normalisations, softmax and the like
    compute in FP32. ``p.grad`` is always the true FP32 gradient: the loss scale is multiplied in where
    a gradient enters the model's output and divided out where it leaves, so it is never seen. A step whose
    gradients overflow is skipped and reported in ``switch.last_step``.

    Args:
        model: any ``nn.Module`` with FP32 parameters, on the CPU or a CUDA device.
        optimizer: one or more ``torch.optim`` optimizers of its parameters; None for inference, and then
            the loss scale stays at 1, since no one would lower it.
        recipe: a name of ``halfstep.recipes()``, one of their synonyms, a text form, or a `Recipe`.

    Raises:
        UnknownNameError: the recipe has no such name; near ones are suggested.
        SwitchError: the model is switched already, or its parameters or device cannot be.
        OperandError: an argument is of another type.

    >>> import torch, halfstep
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> s = halfstep.switch(model, optimizer, recipe="bf16")
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> s.last_step.applied
    True

    Source: Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.
    """
    if not isinstance(model, nn.Module):
        raise OperandError(f"switch takes a torch.nn.Module, not a {type(model).__name__}")
    return Switch(uncompiled(model), optimizers_in(optimizer), Recipe.parse(recipe))


class Switch(Checkpointed, Audited):
    """Mixed precision as it is on one model: what it does, what became of the last step, and the way back."""

    def __init__(self, model: nn.Module, optimizers: list[Optimizer], recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.plan: Plan = make_plan(recipe, device_of(model, recipe))
        check_not_switched(model)
        if recipe.inference_only and optimizers:
            raise SwitchError(
                f"recipe {recipe} is for inference only and was given an optimizer: nothing says how "
                "to train with it. Switch without an optimizer, or take a recipe such as fp8 or int8"
            )
        self.guarded = recipe.guarded and not recipe.is_identity
        self._on = True
        self._scaled = recipe.loss_scaling.kind is not ScalingKind.NONE and bool(optimizers)
        self.ledger = Ledger(recipe.loss_scaling, self._scaled, recipe.largest_gradient)
        self._gate = self.ledger.gate
        self.recorder = Recorder()
        self.ledger.locate = locator(weakref.ref(self))
        self._inside = Intervals()
        self._schedules: dict[int, Schedule] = {}
        self._shapes: dict[int, Shape] = {}
        self._guards: list[Guard] = []
        self._adopted: list[nn.Module] = []
        self._ddp: DistributedDataParallel | None = None
        self._ranks = Ranks()
        self._buckets = Buckets([])
        self.roles = Roles(self.plan, model)
        self.met = Met()
        self._between = BetweenSteps(recipe)
        self._back_to_fp32: Callable[[], None] = _nothing
        self._machinery = Machinery(self)
        if recipe.optimizer.name != "fp32":
            self._back_to_fp32 = become_narrow(model, optimizers, self.plan.low)
        if self.plan.active:
            self._machinery.add(overrides.install(self.plan))
            self._machinery.add(unlisted.install(self.plan))
            self._machinery.add(engine.install(self._before_backward))
            if self._scaled:
                self._machinery.add(hooks.install(self._gate, self._inside))
            if optimizers and self.guarded:
                self._machinery.add(watch_steps(weakref.ref(self)))
            self._adopt(model)
        self._guards.extend(Guard.over(o, self) for o in optimizers)
        self._find_ranks(None)
        self._between.start(model.parameters())

    # -- what a user asks ---------------------------------------------------------------------------

    @property
    def last_step(self) -> StepReport:
        """What became of the last ``optimizer.step()``; waits for the device where it is not known yet."""
        self.ledger.settle()
        return self.ledger.last_step()

    @property
    def steps(self) -> int:
        """How often ``optimizer.step()`` was called."""
        self.ledger.settle()
        return self.ledger.steps

    @property
    def skipped_steps(self) -> int:
        """How many of them were skipped, their gradients not being finite."""
        self.ledger.settle()
        return self.ledger.skipped_steps

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Those whose steps are looked at: given to the switch, or seen to step the model's parameters."""
        return tuple(guard.optimizer for guard in self._guards)

    @property
    def loss_scale(self) -> float:
        """The loss scale that the next backward will use."""
        self.ledger.settle()
        return self._gate.scale

    def was_step_applied(self, optimizer: Optimizer | None = None) -> bool:
        """True where the last ``optimizer.step()`` changed the weights; ``optimizer``: of this one only.

        Of one optimizer it is True before its first step: nothing was skipped.

        Raises:
            OperandError: it is none of the switch's optimizers.
        """
        if optimizer is None:
            return self.last_step.applied
        guard = next((g for g in self._guards if g.optimizer is optimizer), None)
        if guard is None:
            raise OperandError(
                f"was_step_applied takes one of the switch's optimizers, not a {type(optimizer).__name__} "
                "of another"
            )
        return guard.was_step_applied()

    def explain(self) -> Explanation:
        """A table: each kind of operation, whether it runs natively or emulated here, why, and how fast.

        The first call measures small forwards and backwards, in the recipe and in FP32: about a second.
        """
        return explained(self.plan, self.met)

    def outside(self, activation: Tensor) -> Tensor:
        """``activation``, captured inside forward, as an FP32 tensor that may be used outside of the model.

        For losses on intermediate activations (distillation, auxiliary heads): gradients that come in
        through it are scaled as those of the model's output are.

        Raises:
            SwitchError: called outside of a forward of a switched model.
        """
        region = current()
        if region is None:
            if not self.plan.active or not self._on:
                return activation
            raise SwitchError(
                "switch.outside(activation) was called outside of forward; "
                "call it where the activation is made"
            )
        return self._leave(activation, region)

    def off(self) -> None:
        """The model and the optimizers as they were; the weights keep what they have learnt.

        Raises:
            SwitchError: called inside a forward of a switched model.
        """
        if not self._on:
            return
        if current() is not None:
            raise SwitchError("switch.off() was called inside forward; call it between steps")
        self._on = False
        for guard in self._guards:
            guard.leave(self)
            self._between.leave(guard.optimizer, self.names())
        self.ledger.close()
        self.recorder.clear()
        for module in self._adopted:
            release(module, self)
        self._adopted.clear()
        self._machinery.remove()
        self._back_to_fp32()
        self.met.name()

    def on_step(self, callback: Callable[[StepReport], object]) -> Handle:
        """Have ``callback(report)`` called after each step, until ``remove()`` of the handle is.

        It is called in ``optimizer.step()``; where the outcome is on a device still, at the next forward or
        question. `halfstep.switching.log_to` and `on_applied` make callbacks for loggers and averages.
        """
        return self.ledger.reports.subscribe(callback)

    def pace(self, scheduler: Any) -> Handle:
        """Keep a learning-rate scheduler where it is when the step before it was skipped.

        The loop stays as it is: ``scheduler.step()`` does nothing after a skipped ``optimizer.step()`` of its
        own optimizer. The handle's ``remove()`` undoes it. For schedules in steps; one in epochs is to
        advance whatever the epoch's last step was.

        Raises:
            OperandError: it is no scheduler of one of the switch's optimizers.
        """
        return pace(scheduler, self._guards)

    def compress_gradients(self, ddp: DistributedDataParallel, numbers: str = "fp16") -> None:
        """Have ``ddp`` average gradients in 16 bits from now on: half the bytes between processes.

        In ``fp16`` they travel times the loss scale over the number of ranks: where each rank's gradient was
        in range, neither they nor their sum overflow; an overflow is a skipped step as any. With W ranks and
        unit u (2^-11; bf16 2^-8) an element is off by at most ``u * sum |g_r|``, in fp16 by ``W * 2^-25``
        over the scale more.

        Raises:
            OperandError: ``numbers`` is neither, or ``ddp`` is no DistributedDataParallel.
        """
        compress(ddp, numbers, self._gate)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and optimizer: plain numbers and text, no pickle.

        The keys are those of ``torch.amp.GradScaler``, which may load it, and one more, ``halfstep``.
        """
        self.ledger.settle()
        state = write_state(self._state(), self.recipe) | self.roles.state_dict()
        return state | self._between.state_dict(self.names())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``, of a switch or of a ``torch.amp.GradScaler``.

        What the state lacks stays as it is. Growth, backoff and interval of a dynamic scale are the state's
        from then on, as in torch.

        Raises:
            SwitchError: it is of a newer version or another recipe, or has a value that cannot be; nothing
                was changed.
        """
        self.ledger.settle()
        read = read_state(state, self.recipe, self._state())
        self._between.load_state_dict(state, dict(self.model.named_parameters()))
        self.roles.load_state_dict(state)
        self.ledger.set(read.loss_scale)
        self.ledger.steps, self.ledger.skipped_steps = read.steps, read.skipped_steps

    def _state(self) -> State:
        ledger = self.ledger
        return State(
            loss_scale=ledger.loss_scale, steps=ledger.steps, skipped_steps=ledger.skipped_steps
        )

    # -- the region ---------------------------------------------------------------------------------

    def run(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """``call(*args, **kwargs)`` of ``module`` inside a region of its own."""
        self.ledger.settle()
        unlisted.look()
        self._check_device(module)
        ddp = active_ddp()
        if ddp is not self._ddp and ddp is not None:  # it was put around a switched model
            self._find_ranks(ddp)
        changed = self._readopt(module)
        region = self.new_region(module)
        if torch.is_grad_enabled():
            self.roles.begin_step()
        noted = None
        if self._guards and self.guarded and torch.is_grad_enabled() and region.gate is self._gate:
            noted = self.recorder.note(module, call, args, kwargs, self.ledger.steps)
        args, kwargs = map_tensors((args, kwargs), lambda t: self._enter(t, region))
        with contextlib.ExitStack() as opened:
            opened.callback(region.clear)
            opened.enter_context(region.opened())
            opened.enter_context(overrides.autocast(self.plan))

            def leave(out: Any) -> Any:
                check_unwritten(region, self.name_of)
                opened.close()
                if self._scaled and (torch.is_grad_enabled() or has_graph(out)):
                    self._inside.add(region.first_node, region.last_node or region.first_node)
                    schedule = self._schedules.setdefault(id(module), Schedule())
                    if changed:
                        schedule.restart()
                    if schedule.due(graph_shape(region, out)):
                        schedule.leaks |= region.mend_graph(out, region, ())
                left = map_tensors(out, lambda t: self._leave(t, region, noted is not None))
                if noted is not None:
                    hear = None if self._scaled else self.ledger.note_backward
                    self.recorder.await_gradients(noted, left, hear)
                return left

            if has_hooks_after_forward(module):
                return call_leaving(module, lambda: call(*args, **kwargs), leave)
            return leave(graphs.call(region, module, call, args, kwargs))

    def new_region(self, module: nn.Module) -> Region:
        """One for a call of ``module``, not open yet."""
        mend = functools.partial(self._mend_graph, module)
        # Called by a backward of its own inside (a solver's adjoint), it is given gradients that are scaled.
        gate = Gate(1.0) if is_backward_of(self._inside) else self._gate
        return Region(self.plan, gate, self._scaled, self._buckets, mend, self.roles, self.met)

    def _check_device(self, module: nn.Module) -> None:
        parameter = next(module.parameters(), None)
        if parameter is not None and parameter.device.type != self.plan.device:
            raise SwitchError(
                f"the model was moved from {self.plan.device} to {parameter.device.type} while switched: "
                "call switch.off(), move it, and switch it again"
            )

    def _enter(self, t: Tensor, region: Region) -> Tensor:
        everything = self.plan.narrow_writes or not self.plan.wide_operations
        dtype = self.plan.low if everything and t.dtype == torch.float32 else t.dtype
        if self._scaled and t.requires_grad and not torch.is_inference_mode_enabled():
            with torch.enable_grad():  # under no_grad too: forward may enable it again
                return enter(t, region.gate, dtype)
        return t.to(dtype)

    def _leave(self, t: Tensor, region: Region, heard: bool = False) -> Tensor:
        dtype = torch.float32 if t.dtype in _NARROW else t.dtype
        if t.grad_fn is None or torch.is_inference_mode_enabled():
            return t.to(dtype)
        if has_left(t):
            return t
        if self._scaled and is_outside(t.grad_fn, region.first_node, self._inside):
            return t.to(dtype)  # given back as it was
        with torch.enable_grad():
            if self._scaled:
                return leave(t, region.gate, dtype)
            out = t.to(dtype)
            if not heard and out.grad_fn is not None:
                out.grad_fn.register_prehook(lambda grads: self.ledger.note_backward())
            return out

    def _mend_graph(self, module: nn.Module, out: Any, region: Region, given: Any) -> bool:
        where = next((n for n, m in self.model.named_modules() if m is module), "")
        return mend_forward(
            tensors_in(out),
            gate=region.gate,
            first_node=region.first_node,
            inside=self._inside,
            inputs=tensors_in(given),
            where=f"model.{where}" if where else type(module).__name__,
        )

    def _adopt(self, root: nn.Module) -> None:
        self._adopted.extend(adopt(root, self))
        self._find_ranks(self._ddp)
        self._shapes[id(root)] = Shape(root)
        if self.plan.reads_by_role:
            self.roles.look(self.model)
        low = self.plan.low
        masters = working_dtypes(self.model, low)
        if (
            not self._scaled
        ):  # then torch's own cast does for the large, and FP32 ones are read as they are
            masters = [(p, dtype) for p, dtype in masters if dtype == low and p.numel() <= SMALL]
        self._buckets = Buckets(masters)

    def _find_ranks(self, ddp: DistributedDataParallel | None) -> None:
        self._ddp = ddp
        self._ranks = ranks_of(self.model, ddp)

    def _readopt(self, root: nn.Module) -> bool:
        """Take in what was added below ``root`` since its last call; True where anything was."""
        shape = self._shapes.get(id(root))
        if shape is not None and shape.holds(root):
            return False
        self._adopt(root)
        return True

    def take_in(self) -> None:
        """Have modules and parameters that are new in the model take part; `SwitchError` after off()."""
        if not self._on:
            raise SwitchError("the switch is off: there is nothing that it promises any more")
        if self.plan.active and self._readopt(self.model):
            for schedule in self._schedules.values():
                schedule.restart()

    # -- backward and step --------------------------------------------------------------------------

    def _before_backward(self, roots: tuple[Tensor, ...], wanted: tuple[Any, ...]) -> None:
        if not self._scaled or torch._C._current_graph_task_id() != -1:
            return  # within a backward: a checkpoint's own, from the inside
        mend_roots(roots, self._gate, self._inside)
        check_wanted(wanted, self._inside)

    def name_of(self, parameter: Tensor) -> str:
        """The parameter's name in the model; its shape where it is not the model's."""
        return self.names().get(id(parameter)) or f"a parameter of shape {tuple(parameter.shape)}"

    def guard(self, optimizer: Optimizer) -> None:
        """Guard ``optimizer`` from now on, if it holds parameters of the model."""
        if any(
            g.optimizer is optimizer or is_part_of(optimizer, g.optimizer) for g in self._guards
        ):
            return
        own = self.names()
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            self._guards.append(Guard.over(optimizer, self))

    def names(self) -> dict[int, str]:
        """id -> name of the model's parameters."""
        return parameter_names(self.model)

    def ranks(self) -> Ranks:
        """The processes that train the model together."""
        return self._ranks.now()

    def defers(self) -> bool:
        """True where a step's outcome may be learnt after it: no rank, weight or state waits for it."""
        return self._between.idle and not self._ranks

    def before_step(self, optimizer: Optimizer) -> None:
        """Widen the optimizer state that the recipe keeps in fewer bits."""
        if self._between.rounds_state:
            self._between.before(optimizer, self.names())

    def after_step(self, optimizer: Optimizer) -> None:
        """Round the weights and the optimizer state to what the recipe keeps."""
        if not self._between.idle:
            self._between.after(optimizer, self.names())


def _nothing() -> None:
    return None
