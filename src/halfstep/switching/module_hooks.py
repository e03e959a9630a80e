"""Module hooks see what they would see in FP32: true gradients, and the root's output as its caller gets it.

Inside a region a gradient is 16 bits wide and multiplied by the loss scale. What torch hands to a full
backward hook is turned to FP32 and unscaled on its way in, and scaled and rounded again on its way back.
The root's forward hooks run after forward: the region is left between the two.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

from halfstep.switching import graphs
from halfstep.switching.boundary import Gate, scaled, unscaled
from halfstep.switching.region import current

__all__ = ["Forward", "TrueGradients", "call_leaving", "has_hooks_after_forward", "install"]

modules: Any = torch.nn.modules.module
_Grads = Sequence[Tensor | None]
_local = threading.local()


class TrueGradients(BackwardHook):
    """torch's carrier of full backward hooks; those of a module in a region get unscaled FP32 gradients."""

    def __init__(self, module: nn.Module, user_hooks: list[Any], user_pre_hooks: list[Any]) -> None:
        super().__init__(
            module,
            [functools.partial(self._call, hook) for hook in user_hooks],
            [functools.partial(self._call_before, hook) for hook in user_pre_hooks],
        )
        # Where the gradients of the module's inputs and outputs are caught: in a region, or outside of it.
        self._input_gate: Gate | None = None
        self._output_gate: Gate | None = None

    def setup_input_hook(self, args: Any) -> Any:
        """Catch the gradients of the inputs here."""
        self._input_gate = _gate()
        return super().setup_input_hook(args)

    def setup_output_hook(self, args: Any) -> Any:
        """Catch the gradients of the outputs here."""
        self._output_gate = _gate()
        return super().setup_output_hook(args)

    def _call(
        self, hook: Callable[..., Any], module: nn.Module, inputs: _Grads, outputs: _Grads
    ) -> Any:
        given = hook(
            module, _unscaled(inputs, self._input_gate), _unscaled(outputs, self._output_gate)
        )
        return _scaled(given, inputs, self._input_gate)

    def _call_before(self, hook: Callable[..., Any], module: nn.Module, outputs: _Grads) -> Any:
        given = hook(module, _unscaled(outputs, self._output_gate))
        return _scaled(given, outputs, self._output_gate)


def _gate() -> Gate | None:
    region = current()
    return None if region is None else region.gate


def _unscaled(grads: _Grads, gate: Gate | None) -> _Grads:
    if gate is None:
        return grads
    return tuple([None if g is None else unscaled(g, gate) for g in grads])


def _scaled(given: Any, like: _Grads, gate: Gate | None) -> Any:
    """What a hook gave back, as the region has it; torch itself complains where it is not one for one."""
    if gate is None or not isinstance(given, (tuple, list)) or len(given) != len(like):
        return given
    return tuple(
        [
            scaled(g, gate, own.dtype) if isinstance(g, Tensor) and own is not None else g
            for g, own in zip(given, like, strict=True)
        ]
    )


def has_hooks_after_forward(module: Any) -> bool:
    """True where torch calls anything on the module's output after forward."""
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def call_leaving(module: nn.Module, call: Callable[[], Any], leave: Callable[[Any], Any]) -> Any:
    """``call()`` of ``module`` with ``leave`` applied to what its forward gives, before the hooks on it."""
    if not isinstance(module.__dict__.get("forward"), Forward):
        module.__dict__["forward"] = Forward(module)
    waiting = _local.__dict__.setdefault("waiting", {})
    waiting[id(module)] = leave
    try:
        out = call()
    finally:
        waiting.pop(id(module), None)
    return out


class Forward:
    """Stands at a root's ``forward`` where it has hooks on its output; a copied module has none."""

    def __init__(self, module: nn.Module) -> None:
        self.own = module.__dict__.get("forward")  # where a user has set one on the instance
        self.inner = module.forward
        self.module = module
        functools.update_wrapper(self, self.inner, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward, and what is to be done with its output before the hooks see it."""
        # Taken at once: a forward that calls itself is inside the second time.
        leave = getattr(_local, "waiting", {}).pop(id(self.module), None)
        region = current()
        if leave is None or region is None:
            return self.inner(*args, **kwargs)
        return leave(graphs.call(region, self.module, self.inner, args, kwargs))

    def remove(self) -> None:
        """Leave the module's ``forward`` as it was."""
        if self.own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.own

    def __reduce__(self) -> Any:
        if self.own is None:
            return getattr, (self.module, "forward")
        return copy.copy, (self.own,)


def install() -> Callable[[], None]:
    """Have torch carry full backward hooks by `TrueGradients`; returns what ends it."""
    original = modules.BackwardHook
    modules.BackwardHook = TrueGradients

    def undo() -> None:
        modules.BackwardHook = original

    return undo
