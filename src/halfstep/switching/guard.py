"""The optimizer's side: gradients that are not finite never reach it; what is narrow is rounded after it."""

from __future__ import annotations

import collections
import functools
import inspect
import math
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from halfstep import ops
from halfstep.errors import NonFiniteError
from halfstep.switching.ledger import Ledger, not_finite_at_floor
from halfstep.switching.loss_scale import StepReason
from halfstep.switching.naming import place_of
from halfstep.switching.one_pass import step_in_one_pass
from halfstep.switching.ranks import Ranks, local, shards
from halfstep.switching.structure import map_tensors

__all__ = ["Guard", "Owner", "Watcher", "watch_closures", "watch_steps"]


class Owner(Protocol):
    """What a guard asks of a switch."""

    ledger: Ledger
    guarded: bool
    """Gradients that are not finite are kept from the optimizer."""

    def names(self) -> dict[int, str]:
        """id -> name of the model's parameters."""
        ...

    def defers(self) -> bool:
        """True where a step's outcome may be learnt after it."""
        ...

    def ranks(self) -> Ranks:
        """The processes that train the model together."""
        ...

    def before_step(self, optimizer: Optimizer) -> None:
        """The optimizer is about to change weights and state."""
        ...

    def after_step(self, optimizer: Optimizer) -> None:
        """It has: round what the recipe keeps in fewer bits."""
        ...


def _values(grad: Any) -> Tensor:
    """The numbers of a gradient on this rank; of a sparse one, those that it holds."""
    return grad._values() if grad.is_sparse else local(grad)


class Guard:
    """Hooks around ``optimizer.step()``: check, skip or let pass, report.

    One guard an optimizer, for all switches that share it. A step is skipped by running the optimizer's own
    code on a stand-in: the optimizer but for empty parameter groups. State, counters (in the groups too) and
    gradients stay as they are, and learning-rate schedulers see a step that was called. Gradients are out of
    sight meanwhile, for optimizers that keep a list of parameters beside the groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._owners: list[Owner] = []
        self._to_torchs_step: Callable[[], None] | None = None
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._handed_over: Tensor | None = None
        self._nonfinite: list[tuple[_Held, int]] = []
        self._applied: bool | Tensor = True
        """What became of the last step; norms of gradients while that is on the device still."""
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @classmethod
    def over(cls, optimizer: Optimizer, owner: Owner) -> Guard:
        """The guard of ``optimizer``, which reports to ``owner`` too from now on."""
        guard = _guard_of(optimizer) or cls(optimizer)
        guard._owners.append(owner)
        if owner.guarded and guard._to_torchs_step is None:
            guard._to_torchs_step = step_in_one_pass(optimizer)
        return guard

    @classmethod
    def is_over(cls, optimizer: Optimizer, owner: Owner) -> bool:
        """True while ``owner`` is told before and after each step of ``optimizer``."""
        hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        guards = [{getattr(h, "__self__", None) for h in of.values()} for of in hooks]
        return any(isinstance(g, cls) and owner in g._owners for g in guards[0] & guards[1])

    def leave(self, owner: Owner) -> None:
        """Report to ``owner`` no longer; without any owner the hooks are gone."""
        self._owners.remove(owner)
        if not self._owners:
            for handle in self._handles:
                handle.remove()
            if self._to_torchs_step is not None:
                self._to_torchs_step()

    def was_step_applied(self) -> bool:
        """True where the last step of this optimizer changed the weights, and before the first."""
        if isinstance(self._applied, Tensor):
            self._applied = bool(torch.isfinite(self._applied).all())
        return self._applied

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if optimizer is not self.optimizer or _is_nested(optimizer, sys._getframe(1)):
            return None
        self._hidden.clear()  # an earlier step may have raised on its way
        self._nonfinite = []
        if not any(owner.guarded for owner in self._owners):
            self._widen()
            return None
        checked = _with_closure(args, kwargs, self._checked)
        if checked is not None:
            self._widen()
            return checked
        if self._on_device():
            self._hand_over()
            return None
        self._nonfinite = self._check()
        if self._nonfinite:
            return (self._hide(), *args[1:]), kwargs
        self._widen()
        return None

    def _widen(self) -> None:
        for owner in self._owners:
            owner.before_step(self.optimizer)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer is not self.optimizer or _is_nested(optimizer, sys._getframe(1)):
            return
        while self._hidden:
            parameter, grad = self._hidden.pop()
            parameter.grad = grad
        if self._handed_over is not None:
            largest, self._handed_over = self._handed_over, None
            self._applied = largest
            del self.optimizer.found_inf, self.optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]
            held = self._held()
            for owner in self._owners:
                owner.ledger.report_later(largest, functools.partial(_names, owner, held))
            return
        self._applied = not self._nonfinite
        if self._applied:
            for owner in self._owners:
                owner.after_step(self.optimizer)
        self._report(self._nonfinite)

    def _report(self, nonfinite: list[tuple[_Held, int]]) -> None:
        for owner in self._owners:
            reason = StepReason.UNGUARDED
            if owner.guarded:
                reason = StepReason.OVERFLOW if nonfinite else StepReason.FINITE
            owner.ledger.report(
                not nonfinite, reason, _by_name([owner], nonfinite), self._largest(owner)
            )

    def _largest(self, owner: Owner) -> float:
        """max |gradient| where the owner's scale follows it; not finite after an overflow."""
        if not owner.ledger.loss_scale.weighs:
            return 0.0
        grads = self._gradients()
        largest = float(torch.stack(torch._foreach_norm(grads, math.inf)).max()) if grads else 0.0  # pyright: ignore
        return owner.ranks().largest(largest)

    def _gradients(self) -> list[Tensor]:
        """The numbers of their gradients, in the order of `_held`."""
        groups = self.optimizer.param_groups
        return [_values(g) for of in groups for p in of["params"] if (g := p.grad) is not None]

    def _held(self) -> list[_Held]:
        """The parameters that the optimizer holds now and has a gradient for."""
        return [h for h in self._places() if h.parameter.grad is not None]

    def _places(self) -> list[_Held]:
        """The parameters that the optimizer holds now."""
        return [
            _Held(p, g, k, self.optimizer)
            for g, group in enumerate(self.optimizer.param_groups)
            for k, p in enumerate(group["params"])
        ]

    def _on_device(self) -> bool:
        """True where the optimizer can be told on the device to skip: fused, on CUDA, FP32 masters."""
        return (
            getattr(self.optimizer, "_step_supports_amp_scaling", False)
            and all(p.is_cuda for group in self.optimizer.param_groups for p in group["params"])
            and all(owner.defers() for owner in self._owners)
        )

    def _hand_over(self) -> None:
        """Tell a fused optimizer to skip where a gradient is not finite, without waiting for the device."""
        grads = [h.parameter.grad for h in self._held()]
        if not grads:
            return
        largest = torch.stack(torch._foreach_norm(grads, math.inf))  # pyright: ignore
        self._handed_over = largest
        self.optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.found_inf = (~torch.isfinite(largest)).any().to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]

    def _checked(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, evaluated again at a lower scale while its gradients overflow."""

        def evaluate() -> Any:
            while True:
                before = _copied_gradients(self.optimizer)
                loss = closure()
                if self._settles(before):
                    return loss

        return evaluate

    def _settles(self, before: list[tuple[Tensor, Tensor]]) -> bool:
        """True where a closure's gradients are finite; else they are those of ``before``, the scale lower."""
        nonfinite = self._check()
        if not nonfinite:
            return True
        self._report(nonfinite)
        for h in self._held():
            h.parameter.grad = None
        for parameter, grad in before:
            parameter.grad = grad
        return False

    @staticmethod
    def find_late(optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure`` of a step that began with no guard, checked by the one that is there after it."""

        def evaluate() -> Any:
            before = _copied_gradients(optimizer)
            loss = closure()
            guard = _guard_of(optimizer)
            if guard is None or not any(owner.guarded for owner in guard._owners):
                return loss
            return loss if guard._settles(before) else guard._checked(closure)()

        return evaluate

    def _check(self) -> list[tuple[_Held, int]]:
        """Parameters with non-finite gradients; raises where a lower scale cannot mend them.

        The same on all ranks that train the model together: what one of them sees concerns all.
        """
        owners = [owner for owner in self._owners if owner.guarded]
        ledgers = [owner.ledger for owner in owners]
        ranks = functools.reduce(operator.or_, (owner.ranks() for owner in owners))
        try:
            loss_error = None
            for ledger in ledgers:
                loss_error = loss_error or ledger.loss_error()
            nonfinite: list[tuple[_Held, int]] = []
            counts = ops.count_nonfinite(self._gradients())
            if any(counts):
                nonfinite = [(h, n) for h, n in zip(self._held(), counts, strict=True) if n]
            lost, overflown = loss_error is not None, bool(nonfinite)
            if ranks:
                first_lost, first_overflown = ranks.first_with([lost, overflown])
                if first_lost is not None and loss_error is None:
                    loss_error = NonFiniteError(
                        f"the loss on rank {first_lost} is not finite: no loss scale mends that. The "
                        "step was applied on no rank; that rank's own error says more"
                    )
                if loss_error is None and first_overflown is not None:
                    nonfinite = self._of_all(ranks, nonfinite)
            if loss_error is not None:
                raise loss_error
            if nonfinite and all(ledger.exhausted() for ledger in ledgers):
                scale = max(ledger.gate.scale for ledger in ledgers)
                raise NonFiniteError(not_finite_at_floor(_by_name(self._owners, nonfinite), scale))
            if nonfinite and not ranks:
                for ledger in ledgers:
                    ledger.check_cause()
        except NonFiniteError as error:
            for ledger in ledgers:
                ledger.abandon()
            raise ledgers[0].explained(error) from None
        return nonfinite

    def _of_all(self, ranks: Ranks, mine: list[tuple[_Held, int]]) -> list[tuple[_Held, int]]:
        """The counts of all ranks: of a sharded gradient the sum, of one that all have alike its own."""
        everything = self._places()
        seen = {(h.group, h.index): n for h, n in mine}
        sums = ranks.sums([seen.get((h.group, h.index), 0) for h in everything])
        return [
            (h, -(-n * shards(h.parameter) // ranks.size))
            for h, n in zip(everything, sums, strict=True)
            if n
        ]

    def _hide(self) -> Optimizer:
        """The stand-in of a step that is skipped; gradients are put away until `_after`."""
        for h in self._held():
            self._hidden.append((h.parameter, h.parameter.grad))  # pyright: ignore[reportArgumentType]
            h.parameter.grad = None
        kept = {id(h.parameter) for h in self._places()}
        if type(self.optimizer) not in _TORCHS and not _steps(_stand_in(self.optimizer, kept)):
            return _stand_in(self.optimizer, kept, torch.zeros(1, requires_grad=True))
        return _stand_in(self.optimizer, kept)


_TORCHS = frozenset(v for v in vars(torch.optim).values() if isinstance(v, type))


def _stand_in(optimizer: Optimizer, kept: set[int], dummy: Tensor | None = None) -> Optimizer:
    """``optimizer`` without parameters; with ``dummy`` in each group, and state apart, where it is given."""
    kind = type(optimizer)
    made = kind.__new__(kind)
    made.__dict__.update(_apart(optimizer.__dict__, kept))
    for key, value in optimizer.__dict__.items():
        if isinstance(value, Optimizer) and value is not optimizer:  # wrapped, and stepped by it
            made.__dict__[key] = _stand_in(value, kept, dummy)
    if isinstance(getattr(kind, "param_groups", None), property):
        return made  # the wrapped one's
    given: list[Tensor] = []
    if dummy is not None:
        dummy.grad = torch.zeros_like(dummy)
        given = [dummy]
        made.state = collections.defaultdict(dict)
    made.param_groups = [
        {**_apart({**g, "params": []}, kept), "params": given} for g in optimizer.param_groups
    ]
    return made


def _steps(stand_in: Optimizer) -> bool:
    """True where its own code steps without parameters; some that count them raise."""
    try:
        inspect.unwrap(type(stand_in).step)(stand_in)
    except Exception:  # a user's class may raise anything
        return False
    return True


# What is many parameters large, or is no affair of a step.
_SHARED = ("param_groups", "state", "defaults")


def _apart(values: dict[str, Any], kept: set[int]) -> dict[str, Any]:
    """``values`` with copies of the tensors in them but those ``kept``: a count that is added to in place."""

    def copied(t: Tensor) -> Tensor:
        return t if id(t) in kept else t.detach().clone().requires_grad_(t.requires_grad)

    return {k: v if k in _SHARED else map_tensors(v, copied) for k, v in values.items()}


class Watcher(Protocol):
    """Who guards optimizers that are seen to step."""

    def guard(self, optimizer: Optimizer) -> None:
        """Guard ``optimizer`` from now on, if it is one to be guarded."""
        ...


def watch_closures() -> Callable[[], None]:
    """Check the closures of optimizers whose guard comes while they run; returns what ends it.

    Lightning calls a model for the first time inside of the closure of its optimizer's first step.
    """

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _guard_of(optimizer) is not None:
            return None
        return _with_closure(args, kwargs, functools.partial(Guard.find_late, optimizer))

    return register_optimizer_step_pre_hook(before).remove


def _guard_of(optimizer: Optimizer) -> Guard | None:
    hooks = optimizer._optimizer_step_pre_hooks.values()
    guards = (getattr(hook, "__self__", None) for hook in hooks)
    return next((g for g in guards if isinstance(g, Guard)), None)


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a step, the optimizer first, with its closure changed; None where it has none."""
    if len(args) > 1:
        return None if args[1] is None else ((args[0], change(args[1]), *args[2:]), kwargs)
    closure = kwargs.get("closure")
    return None if closure is None else (args, {**kwargs, "closure": change(closure)})


def _copied_gradients(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Parameters with their gradients as they are before a closure, which may add to them."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [(p, p.grad.clone()) for p in parameters if p.grad is not None]


def watch_steps(watcher: weakref.ref[Any]) -> Callable[[], None]:
    """Show ``watcher`` every optimizer about to step, given to a switch or not; returns what ends it."""

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found: Watcher | None = watcher()
        if found is not None:
            found.guard(optimizer)

    return register_optimizer_step_pre_hook(before).remove


class _Held(NamedTuple):
    """A parameter with a gradient, and where the optimizer keeps it."""

    parameter: Tensor
    group: int
    index: int
    optimizer: Optimizer

    def name(self, known: dict[int, str]) -> str:
        """Its name in a model, or else its place in the optimizer."""
        place = place_of(self.optimizer, self.group, self.index)
        return known.get(id(self.parameter), place)


def _names(owner: Owner, held: Iterable[_Held]) -> list[str]:
    known = owner.names()
    return [h.name(known) for h in held]


def _by_name(owners: Iterable[Owner], nonfinite: list[tuple[_Held, int]]) -> dict[str, int]:
    if not nonfinite:
        return {}
    known: dict[int, str] = {}
    for owner in owners:
        known = {**owner.names(), **known}
    return {h.name(known): n for h, n in nonfinite}


def _is_nested(optimizer: Optimizer, step: types.FrameType) -> bool:
    """True where ``step``, the frame of torch's wrapper around step(), runs inside another of this optimizer.

    A subclass whose step calls its parent's runs the hooks twice. The stack says so with nothing to keep
    in order when a step raises.
    """
    frame = step.f_back
    while frame is not None:
        if frame.f_code is step.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False
