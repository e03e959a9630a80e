"""What torch.compile is to know of functions of ours, and they of it: whether a graph is being made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

__all__ = ["is_tracing", "left_alone", "set_compiler", "skipped", "tracing"]

F_ = TypeVar("F_", bound=Callable[..., Any])
_eval_frame: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
set_compiler: Callable[[Any], Any] = _eval_frame.set_eval_frame
"""Put a compiler of torch's, or None, to work on the functions that are called next; returns what was.

In C, so that no compiler looks at the call.
"""
_SKIP, _DEFAULT = _eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.DEFAULT


class _Local(threading.local):
    on = False


_local = _Local()


def is_tracing() -> bool:
    """True on a thread where torch.compile makes a graph of the inside of a region.

    Tensors have no numbers then, and no address.
    """
    return _local.on


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """A graph is made until the block is left."""
    before, _local.on = _local.on, True
    try:
        yield
    finally:
        _local.on = before


def skipped(function: F_, *, why: str) -> F_:
    """``function``, itself in no graph; the compiler stays at work for what it calls.

    As ``torch._dynamo.skip``, without taking torch's compiler in: that takes over a second.
    """
    strategy = _eval_frame._FrameExecStrategy(_SKIP, _DEFAULT)
    _eval_frame.set_code_exec_strategy(function.__code__, strategy)
    # what the compiler looks for where it meets a call of it
    function._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
    function._torchdynamo_disable_msg = why  # pyright: ignore[reportFunctionMemberAccess]
    return function


def left_alone(function: F_) -> F_:
    """``function``, which torch's dispatcher calls: no compiler is at work in it, nor for what it calls."""
    strategy = _eval_frame._FrameExecStrategy(_SKIP, _SKIP)
    _eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function
