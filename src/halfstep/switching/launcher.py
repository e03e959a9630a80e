"""Find the models that a script trains, without being told, and switch them: ``halfstep run``.

A model is found when it is called. The outermost module of a call is the root of a region; it is switched,
from that call on, where an optimizer holds one of its parameters, or where gradients are recorded and one of
its parameters requires grad (scripts that update parameters by hand). ::

    a module is called outermost, and is not switched yet:
        optimizers = those alive that hold one of its parameters
        if optimizers or (grad is enabled and one of its parameters requires grad):
            switch it with all of them; smaller roots inside it are taken over
    an optimizer is given a parameter of a root that was switched with no optimizer:
        switch that root again, with it
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from halfstep.errors import BrokenPromiseError, NonFiniteError, SwitchError
from halfstep.recipe import Recipe
from halfstep.switching import engine
from halfstep.switching.admission import uncompiled
from halfstep.switching.audit_table import Audit
from halfstep.switching.explanation import Explanation
from halfstep.switching.guard import watch_closures
from halfstep.switching.loss_scale import StepReport
from halfstep.switching.met import Met
from halfstep.switching.plan import make_plan
from halfstep.switching.region import current
from halfstep.switching.run_summary import LeftAlone, ModelRun, RunSummary, SkippedStep
from halfstep.switching.script_precision import ScriptPrecision
from halfstep.switching.switch import Switch, switch
from halfstep.switching.tracing import is_tracing, set_compiler, skipped

__all__ = ["Launcher"]

_SKIPS_KEPT = 1000
_NARROW = (torch.float16, torch.bfloat16)


class _Local(threading.local):
    outermost = False
    """A module's call is being decided on or made, on this thread."""


class _Run:
    """A switched root and its steps. The model is not kept alive: a script may make thousands."""

    def __init__(self, model: nn.Module, *, audited: bool) -> None:
        self.name = _name(model)
        self.audited = audited
        self.audits: tuple[Audit, ...] = ()
        self.device = ""
        self.optimizers: tuple[str, ...] = ()
        self.steps = 0
        self.skipped = 0
        self.mets: list[Met] = []
        self.scales: list[tuple[int, float]] = []
        self.skips: list[SkippedStep] = []
        self.model = weakref.ref(model)
        self.switch: Callable[[], Switch | None] = lambda: None

    def follow(self, made: Switch) -> None:
        """Count the steps of ``made`` from now on."""
        self.switch = weakref.ref(made)
        self.device = made.plan.device
        self.mets.append(made.met)
        self.optimizers = tuple(type(o).__name__ for o in made.optimizers)
        made.on_step(self._note)

    def _note(self, report: StepReport) -> None:
        self.steps += 1
        if not self.scales or self.scales[-1][1] != report.loss_scale:
            self.scales.append((self.steps, report.loss_scale))
        if self.audited and report.applied and not self.audits:
            self._audit()  # the script may let go of the model before it ends
        if not report.applied:
            self.skipped += 1
            if len(self.skips) < _SKIPS_KEPT:
                skip = SkippedStep(
                    step=self.steps, loss_scale=report.loss_scale, nonfinite=report.nonfinite
                )
                self.skips.append(skip)

    def _audit(self) -> None:
        made = self.switch()
        if made is None:
            return
        try:
            self.audits = (made.audit(),)
        except BrokenPromiseError as error:
            self.audits = (error.audit,)
        except SwitchError:
            pass  # it is off: what was found while it was on stays

    def frozen(self) -> ModelRun:
        """As it is now; waits for a device where the outcome of a step is open."""
        made = self.switch()
        if made is not None:
            with contextlib.suppress(NonFiniteError):  # the script has ended without asking
                made.ledger.settle()
            self.optimizers = tuple(type(o).__name__ for o in made.optimizers)
            if self.audited and not any(audit.broken for audit in self.audits):
                self._audit()
        return ModelRun(
            name=self.name,
            device=self.device,
            optimizers=self.optimizers,
            steps=self.steps,
            skipped=self.skipped,
            scales=tuple(self.scales),
            skips=tuple(self.skips),
            audits=self.audits,
        )


class Launcher:
    """Puts ``recipe`` on every model that this process trains, from `install` on.

    ``audited``: each is audited after its first step, and at the end where it is there still.

    Raises:
        SwitchError: the recipe has no executor.
    """

    def __init__(self, recipe: Recipe, *, audited: bool = False) -> None:
        make_plan(recipe, "cpu")  # refused here, before the script has run for hours
        self.recipe = recipe
        self._audited = audited
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._runs: list[_Run] = []
        self._left: dict[str, LeftAlone] = {}
        self._backwards = 0
        # Roots of a recipe that changes nothing: torch's autocast is kept from them.
        self._plain: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._precision = ScriptPrecision(lambda: bool(self._runs))
        self._lock = threading.RLock()
        self._local = _Local()
        self._undo: list[Callable[[], None]] = []
        self._class_call: Callable[..., Any] = nn.Module._call_impl

    # -- torch's doors ------------------------------------------------------------------------------

    def install(self) -> None:
        """Look at the modules that are called and the optimizers that are made, in this process only."""
        self._precision.install()
        self._undo = [
            self._precision.remove,
            engine.install(self._count_backward),
            watch_closures(),
            self._patch_modules(),
            self._patch_optimizers(),
        ]
        os.register_at_fork(after_in_child=self.remove)

    def remove(self) -> None:
        """Look no more; models that are switched stay so."""
        while self._undo:
            self._undo.pop()()

    def _patch_modules(self) -> Callable[[], None]:
        original = self._class_call
        local = self._local

        @functools.partial(skipped, why="halfstep run looks at the modules that are called")
        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if local.outermost or not self._undo or current() is not None:
                return original(module, *args, **kwargs)
            if not module._parameters and not module._modules:
                return original(module, *args, **kwargs)  # a loss: looked at every step
            local.outermost = True
            try:
                theirs = set_compiler(None)  # which would look at what is called
                try:
                    does = self._call_of(module)
                finally:
                    set_compiler(theirs)
                return does(*args, **kwargs)
            finally:
                local.outermost = False

        nn.Module._call_impl = call  # pyright: ignore[reportAttributeAccessIssue]

        def undo() -> None:
            nn.Module._call_impl = original

        return undo

    def _patch_optimizers(self) -> Callable[[], None]:
        original = (
            Optimizer.add_param_group
        )  # through which every parameter comes, at construction too

        @functools.wraps(original)
        def add_param_group(optimizer: Optimizer, param_group: dict[str, Any]) -> None:
            original(optimizer, param_group)
            self._optimizers.add(optimizer)
            self._switch_again(optimizer)

        Optimizer.add_param_group = add_param_group  # pyright: ignore[reportAttributeAccessIssue]

        def undo() -> None:
            Optimizer.add_param_group = original

        return undo

    def _count_backward(self, roots: tuple[Tensor, ...], wanted: tuple[Any, ...]) -> None:
        # Not one within another (a checkpoint's own), nor one of which a graph is made.
        if torch._C._current_graph_task_id() == -1 and not is_tracing():
            self._backwards += 1

    # -- models -------------------------------------------------------------------------------------

    def _call_of(self, module: nn.Module) -> Callable[..., Any]:
        """What a call of ``module``, in no other, is to do; it is switched now where the script trains it."""
        model = uncompiled(module)
        known = model in self._plain or (
            model is not module and "_call_impl" in model.__dict__  # what is around it, is not
        )
        if not (known or self._attach(model)):
            return functools.partial(self._class_call, module)
        if model in self._plain:
            return functools.partial(self._call_plain, module)
        return module._call_impl if model is module else functools.partial(self._class_call, module)

    def _call_plain(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._precision.forbidden(_device(module)):
            return self._class_call(module, *args, **kwargs)

    def _attach(self, module: nn.Module) -> bool:
        """Switch ``module`` where the script trains it; True where it did."""
        parameters = list(module.parameters())
        if not parameters or torch._C._get_tracing_state() is not None:
            return False
        if any(is_lazy(p) for p in parameters):
            return False  # its first call gives them shapes: the second is looked at
        with self._lock:
            optimizers = self._holding(parameters)
            if not optimizers and not (
                torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
            ):
                return False
            reason = _cannot(module, parameters)
            if reason:
                self._leave(module, reason)
                return False
            return self._switch(module, optimizers, _Run(module, audited=self._audited))

    def _holding(self, parameters: list[nn.Parameter]) -> list[Optimizer]:
        """The optimizers that hold one of ``parameters``."""
        wanted = {id(p) for p in parameters}
        return [
            optimizer
            for optimizer in list(self._optimizers)
            if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])
        ]

    def _switch(self, module: nn.Module, optimizers: list[Optimizer], run: _Run) -> bool:
        inside = {id(m) for m in module.modules()}
        for other in list(self._runs):
            smaller = other.model()
            if smaller is None or id(smaller) not in inside:
                continue
            made = other.switch()
            if made is not None:
                made.off()
            self._plain.discard(smaller)
            if not other.steps and other is not run:
                self._runs.remove(other)
        # What a switch binds is torch's own call, so that a call inside a region costs nothing more.
        looking, nn.Module._call_impl = nn.Module._call_impl, self._class_call
        try:
            made = switch(module, optimizers, self.recipe)
        except SwitchError as error:
            self._leave(module, str(error))
            return False
        finally:
            nn.Module._call_impl = looking
        run.follow(made)
        if run not in self._runs:
            self._runs.append(run)
        if not made.plan.active:
            self._plain.add(module)
        return True

    def _switch_again(self, optimizer: Optimizer) -> None:
        """Roots that were switched before they had an optimizer: now there is one to skip steps of."""
        if current() is not None:
            return
        with self._lock:
            for run in list(self._runs):
                model = run.model()
                if model is None or run.optimizers:
                    continue
                optimizers = self._holding(list(model.parameters()))
                if optimizer in optimizers:
                    self._switch(model, optimizers, run)

    def _leave(self, module: nn.Module, reason: str) -> None:
        self._left.setdefault(_name(module), LeftAlone(name=_name(module), reason=reason))

    # -- the end ------------------------------------------------------------------------------------

    def summary(self) -> RunSummary:
        """What the script has come to so far."""
        models = tuple(run.frozen() for run in self._runs)
        devices = dict.fromkeys(model.device for model in models)
        met = Met()
        for one in (one for run in self._runs for one in run.mets):
            met.take(one)
        return RunSummary(
            recipe=str(self.recipe),
            models=models,
            left=tuple(self._left.values()),
            explanations=tuple(
                Explanation(recipe=str(self.recipe), device=d, rows=make_plan(self.recipe, d).rows)
                for d in devices
            ),
            unlisted=met.found,
            backwards=self._backwards,
            autocast=self._precision.autocast,
            grad_scaler=self._precision.grad_scaler,
        )


def _cannot(module: nn.Module, parameters: list[nn.Parameter]) -> str:
    """Why a trained module is left as it is; empty where it is switched."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled to TorchScript, whose operations cannot be reached"
    dtypes = {p.dtype for p in parameters}
    if dtypes <= {torch.float64, torch.complex64, torch.complex128}:
        return f"its parameters are {' and '.join(sorted(str(d) for d in dtypes))}"
    narrow = [str(d) for d in _NARROW if d in dtypes]
    if narrow:
        return f"it has parameters in {' and '.join(narrow)}: the switch starts from FP32 masters"
    return ""


def _name(module: nn.Module) -> str:
    """The class; of a wrapper, with what it wraps."""
    kind = type(module).__name__
    inner = getattr(module, "_orig_mod", None)
    if isinstance(module, (nn.DataParallel, DistributedDataParallel)):
        inner = module.module
    return f"{kind}({_name(inner)})" if isinstance(inner, nn.Module) else kind


def _device(module: nn.Module) -> str:
    return next(module.parameters()).device.type
