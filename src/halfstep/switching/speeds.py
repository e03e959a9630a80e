"""How long each kind of operation takes in a recipe, over FP32: measured where it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from halfstep.switching import overrides
from halfstep.switching.explanation import Explanation
from halfstep.switching.met import Met
from halfstep.switching.plan import Kind, Plan
from halfstep.switching.region import loose_region

__all__ = ["PROGRAMS", "explained", "times_over_fp32"]

_REPEATS = 9
_SECONDS = 0.06  # of one kind, after its first call

_known: dict[tuple[str, str], dict[str, float]] = {}


def explained(plan: Plan, met: Met) -> Explanation:
    """The table of a plan, of what was met in no list, and of the times that are measured here."""
    return Explanation(
        recipe=str(plan.recipe),
        device=plan.device,
        rows=(*plan.rows, *met.rows(plan)),
        times=times_over_fp32(plan),
    )


def times_over_fp32(plan: Plan) -> dict[str, float]:
    """kind of operation -> time of a forward and backward in ``plan`` over that of FP32.

    The least of some calls each, by turns, at sizes of about a millisecond; measured once a process for a
    recipe and a device, on a CPU by the processor time of one thread, which other programs do not lengthen.
    Empty for a plan that changes nothing. What is random, recorded or counted elsewhere is left as it is.
    """
    if not plan.active:
        return {}
    key = str(plan.recipe), plan.device
    if key not in _known:
        uninstall = overrides.install(plan)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
                _known[key] = {kind.value: _ratio(plan, kind) for kind in Kind}
        finally:
            torch.set_num_threads(threads)
            uninstall()
    return dict(_known[key])


def _ratio(plan: Plan, kind: Kind) -> float:
    program, *sizes = PROGRAMS[kind]
    wide = [_numbers(size, plan.device) for size in sizes]
    low = [t.detach().to(plan.low).requires_grad_() for t in wide]

    def in_fp32() -> None:
        with torch.autocast(plan.device, enabled=False):
            _forward_and_backward(program, wide)

    def in_recipe() -> None:
        region = loose_region(plan, Met())
        with region.opened(), overrides.autocast(plan):
            _forward_and_backward(program, low)
        region.clear()

    def seconds(call: Callable[[], None]) -> float:
        if plan.device == "cpu":
            begun = time.thread_time()
            call()
            return time.thread_time() - begun
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    contestants = in_fp32, in_recipe
    best = [seconds(call) for call in contestants]
    if best[1] < _SECONDS:  # else the first call was long enough to tell
        spent = 0.0
        for _ in range(_REPEATS):
            again = [seconds(call) for call in contestants]
            best = [min(pair) for pair in zip(best, again, strict=True)]
            spent += sum(again)
            if spent > _SECONDS:
                break
    return best[1] / best[0]


def _forward_and_backward(program: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    out = program(*leaves)
    # By torch's engine itself: who looks at the program's backwards is not to see these.
    torch.autograd.Variable._execution_engine.run_backward(
        (out,), (torch.ones_like(out),), False, False, tuple(leaves), True, False
    )


def _numbers(size: tuple[int, ...], device: str) -> Tensor:
    """Numbers between -1 and 1 that no generator is asked for."""
    count = torch.Size(size).numel()
    t = torch.arange(count, dtype=torch.float32, device=device).mul_(0.7).sin_()
    return t.view(size).requires_grad_()


def _lstm(x: Tensor, *weights: Tensor) -> Tensor:
    h = x.new_zeros(1, x.size(1), weights[1].size(1))
    return torch._VF.lstm(x, (h, h), list(weights), False, 1, 0.0, True, False, False)[0]


PROGRAMS: dict[Kind, tuple[Any, ...]] = {
    Kind.MATMUL: (F.linear, (256, 512), (512, 512)),
    Kind.CONVOLUTION: (F.conv2d, (4, 32, 16, 16), (32, 32, 3, 3)),
    Kind.ATTENTION: (F.scaled_dot_product_attention, *[(2, 4, 128, 64)] * 3),
    Kind.RECURRENT: (_lstm, (8, 32, 64), (256, 64), (256, 64)),
    Kind.WIDE: (lambda x: F.softmax(F.layer_norm(x, (512,)), -1), (128, 512)),
    Kind.POINTWISE: (lambda x, y: F.gelu(x * y + x), (128, 1024), (128, 1024)),
}
"""A function of FP32 or 16-bit tensors, and their sizes."""
