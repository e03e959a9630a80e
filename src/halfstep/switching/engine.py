"""Where torch's own machinery is met: the autograd engine's entry, checkpointing, custom functions, hooks.

Installed while a switch is on, taken away with the last one.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor
from torch.autograd.function import FunctionCtx

from halfstep.switching import module_hooks
from halfstep.switching.region import reopening

__all__ = ["install", "roots", "unnoticed"]

_lock = threading.Lock()
_users = 0
_undo: list[Callable[[], None]] = []
_local = threading.local()
# Called before each backward, with its roots and with what it is to give gradients for.
Listener = Callable[[tuple[Tensor, ...], tuple[Any, ...]], None]
_listeners: list[weakref.WeakMethod[Listener]] = []


# The roots of the backward that began last on any thread.
_latest: tuple[Tensor, ...] = ()


def roots() -> tuple[Tensor, ...]:
    """The tensors whose backward is running (the loss).

    On a thread of torch's own, which runs a CUDA device's part of a backward, those of the last one begun.
    """
    mine: tuple[Tensor, ...] | None = getattr(_local, "roots", None)
    return _latest if mine is None else mine


def install(listener: Listener) -> Callable[[], None]:
    """Have ``listener``, a method, called before every backward; returns what ends it.

    The method's object is not kept alive.
    """
    global _users
    weak = weakref.WeakMethod(listener)
    with _lock:
        if _users == 0:
            patches = (_patch_engine, _patch_checkpoint, _patch_contexts, module_hooks.install)
            _undo.extend(patch() for patch in patches)
        _users += 1
        _listeners.append(weak)

    def uninstall() -> None:
        global _users
        with _lock:
            _listeners.remove(weak)
            _users -= 1
            if _users == 0:
                while _undo:
                    _undo.pop()()

    return uninstall


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Backwards on this thread are none of the program's: no listener is told of them."""
    before, _local.unnoticed = getattr(_local, "unnoticed", False), True
    try:
        yield
    finally:
        _local.unnoticed = before


def _patch_engine() -> Callable[[], None]:
    original = torch.autograd._engine_run_backward  # pyright: ignore[reportPrivateImportUsage]

    def run_backward(
        tensors: Any, grads: Any, keep: Any, create: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        global _latest
        before = getattr(_local, "roots", None)
        _latest = _local.roots = tuple(t for t in tensors if isinstance(t, Tensor))
        try:
            for weak in () if getattr(_local, "unnoticed", False) else tuple(_listeners):
                listener = weak()
                if listener is not None:
                    listener(_local.roots, tuple(inputs))
            return original(tensors, grads, keep, create, inputs, *args, **kwargs)
        finally:
            _local.roots = before
            if before is None:
                _latest = ()  # a loss is not kept alive

    torch.autograd._engine_run_backward = run_backward  # pyright: ignore[reportPrivateImportUsage]

    def undo() -> None:
        torch.autograd._engine_run_backward = original  # pyright: ignore[reportPrivateImportUsage]

    return undo


def _patch_checkpoint() -> Callable[[], None]:
    """A checkpointed function runs again inside the backward: in its region, and not as a new one."""
    function = checkpointing.CheckpointFunction
    forward = function.forward
    without_reentrant = checkpointing._checkpoint_without_reentrant_generator
    of_autocast = checkpointing._get_autocast_kwargs

    def forward_reopening(ctx: Any, run_function: Any, preserve: bool, *args: Any) -> Any:
        return forward(ctx, reopening(run_function), preserve, *args)

    def generator_reopening(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return without_reentrant(reopening(fn), *args, **kwargs)

    def autocast_to_restore(*args: Any, **given: Any) -> Any:
        """Without a region's FP32, at which torch's own warns and turns itself off: `reopening` sets it."""
        found = of_autocast(*args, **given)
        for kwargs in filter(None, found):
            kwargs["enabled"] = kwargs["enabled"] and kwargs["dtype"] is not torch.float32
        return found

    function.forward = staticmethod(forward_reopening)  # pyright: ignore[reportAttributeAccessIssue]
    checkpointing._checkpoint_without_reentrant_generator = generator_reopening
    checkpointing._get_autocast_kwargs = autocast_to_restore

    def undo() -> None:
        function.forward = staticmethod(forward)
        checkpointing._checkpoint_without_reentrant_generator = without_reentrant
        checkpointing._get_autocast_kwargs = of_autocast

    return undo


# What torch.amp.custom_bwd reads of a function's context: whether forward had autocast, and its dtype.
_AUTOCAST_OF_FORWARD = {"_fwd_used_autocast": False, "_dtype": None}


def _patch_contexts() -> Callable[[], None]:
    """custom_fwd notes them on forward's first argument, which is no context where there is setup_context.

    Without them the backward raises AttributeError (pytorch#132388). It runs without autocast then, as
    where neither decorator is: its tensors are in the dtypes that forward gave.
    """
    ours = [name for name in _AUTOCAST_OF_FORWARD if not hasattr(FunctionCtx, name)]
    for name in ours:
        setattr(FunctionCtx, name, _AUTOCAST_OF_FORWARD[name])

    def undo() -> None:
        for name in ours:
            delattr(FunctionCtx, name)

    return undo
