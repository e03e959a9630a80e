"""What an emulation puts into torch while it is on, each with its way back.

torch's fused kernels hide operations; threads, compiled regions and autocast leave the dispatch mode's sight.
Each function here installs one thing and returns what takes it away.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfstep.switching import fast_path

__all__ = [
    "forbid_fused_attention",
    "patch_engine",
    "patch_float",
    "patch_recurrent",
    "patch_threads",
]

Undo = Callable[[], None]


# Each has a flag, ``torch._C._get_NAME_sdp_enabled()``, and what sets it.
_ATTENTION_KERNELS = ("flash", "mem_efficient", "cudnn", "math", "overrideable")


def forbid_fused_attention() -> Undo:
    """Attention as products and a softmax, and no fused encoder layer, whatever kernel a program asks for."""
    kernels = torch._C
    getters = {name: f"_get_{name}_sdp_enabled" for name in _ATTENTION_KERNELS}
    setters = {name: f"_set_sdp_use_{name}" for name in _ATTENTION_KERNELS}
    setters = {name: setter for name, setter in setters.items() if hasattr(kernels, setter)}
    originals = {name: getattr(kernels, setter) for name, setter in setters.items()}
    before = {name: getattr(kernels, getters[name])() for name in setters}
    for name, set_flag in originals.items():
        set_flag(name == "math")
        # torch.nn.attention.sdpa_kernel() sets them and sets them back
        setattr(kernels, setters[name], _set_nothing)
    fast_path.forbid()

    def undo() -> None:
        for name, set_flag in originals.items():
            setattr(kernels, setters[name], set_flag)
            set_flag(before[name])
        fast_path.allow()

    return undo


def _set_nothing(enabled: bool) -> None:
    """A program's wish for an attention kernel, while there is one way to compute it."""


def patch_threads(around: Callable[[], Any]) -> Undo:
    """Threads that are started run inside ``around()``: a dispatch mode is its thread's own."""
    original = threading.Thread.run

    @functools.wraps(original)
    def run(self: threading.Thread) -> None:
        with around():
            original(self)

    threading.Thread.run = run

    def undo() -> None:
        threading.Thread.run = original

    return undo


def patch_engine(around: Callable[[bool], Any], results: Callable[[Tensor], None]) -> Undo:
    """Backwards run inside ``around(create_graph)``; ``results`` is told what autograd.grad returns."""
    original = torch.autograd._engine_run_backward  # pyright: ignore[reportPrivateImportUsage]

    def run_backward(
        tensors: Any, grads: Any, keep: Any, create: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with around(bool(create)):
            out = original(tensors, grads, keep, create, inputs, *args, **kwargs)
        for t in out or ():
            if isinstance(t, Tensor):
                results(t)
        return out

    torch.autograd._engine_run_backward = run_backward  # pyright: ignore[reportPrivateImportUsage]

    def undo() -> None:
        torch.autograd._engine_run_backward = original  # pyright: ignore[reportPrivateImportUsage]

    return undo


def patch_float(widened: Callable[[Tensor], Tensor | None]) -> Undo:
    """``x.float()`` and ``x.to(torch.float32)``: below autograd they are nothing, as carriers are FP32.

    ``widened(x)`` gives what they are to give, or None where torch's own answer is right.
    """
    to, single = Tensor.to, Tensor.float

    @functools.wraps(to)
    def patched_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") is torch.float32 or torch.float32 in args[:2]:
            wide = widened(self)
            if wide is not None:
                return to(wide, *args, **kwargs)
        return to(self, *args, **kwargs)

    @functools.wraps(single)
    def patched_float(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wide = widened(self)
        return single(self, *args, **kwargs) if wide is None else wide

    return _patched(Tensor, {"to": patched_to, "float": patched_float})


def patch_recurrent(layers: Callable[[torch._ops.OpOverload, tuple[Any, ...]], Any]) -> Undo:
    """``torch.nn``'s recurrent layers go to ``layers(op, arguments)``; NotImplemented has torch do it."""
    place: Any = torch._VF

    def patched(name: str) -> Callable[..., Any]:
        original = getattr(place, name)
        packet = getattr(torch.ops.aten, name)

        def run(*args: Any) -> Any:
            packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
            out = layers(packet.data if packed else packet.input, args)
            if out is not NotImplemented:
                return out
            fused = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)  # step by step, of plain operations
            try:
                return original(*args)
            finally:
                torch._C._set_mkldnn_enabled(fused)

        return run

    return _patched(
        place, {name: patched(name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
    )


def _patched(place: Any, attributes: dict[str, Any]) -> Undo:
    """Set attributes; the way back leaves those of the base class, where there were none."""
    before = {name: vars(place)[name] for name in attributes if name in vars(place)}
    for name, value in attributes.items():
        setattr(place, name, value)

    def undo() -> None:
        for name in attributes:
            if name in before:
                setattr(place, name, before[name])
            else:
                delattr(place, name)

    return undo
