"""What one operation costs beside its arithmetic: tensors of 4x4, in microseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import halfstep
from halfstep.ops import round_blocks
from halfstep.study.benchmarks.harness import Ratio, Row, Sense, Target

__all__ = ["rows"]

_CALLS = 200
_RECIPES = ("fp16", "bf16", "fp16-naive")
_IN_BLOCKS = ("fp8", "mxfp8", "nvfp4:keep=none,hadamard=0", "int8:keep=none")
"""Those that the emulator takes: it sees no layers to keep, nor which product is a weight's gradient."""
_PRODUCTS = ("mm", "linear", "conv2d")
_EMULATED = 30.0
"""Microseconds that an operation may take beyond plain torch's."""

Call = Callable[[], object]


def rows(*, rounds: int) -> Iterator[Row]:
    """Operations of an emulated program beyond plain torch's, then halfstep's own operations."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    calls = _operations(x, y)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for recipe in (*_RECIPES, *_IN_BLOCKS):
            for name in calls if recipe in _RECIPES else _PRODUCTS:
                yield _row(
                    f"4x4 {name}, {recipe} emulated",
                    "microseconds beyond plain torch",
                    _beyond(calls[name], recipe, rounds),
                    _EMULATED,
                )
        for name, (call, bound) in _own(x, y).items():
            yield _row(f"4x4 {name}", "microseconds", _microseconds(call, rounds), bound)
    finally:
        torch.set_num_threads(threads)


def _operations(x: Tensor, y: Tensor) -> Mapping[str, Call]:
    weight, bias = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))
    image, kernel = x.view(1, 1, 4, 4), torch.nn.Parameter(torch.randn(1, 1, 3, 3))
    return {
        "add": lambda: x + y,
        "relu": lambda: torch.relu(x),
        "sum": lambda: x.sum(1),
        "softmax": lambda: torch.softmax(x, -1),
        "mm": lambda: x @ y,
        "linear": lambda: F.linear(x, weight, bias),
        "conv2d": lambda: F.conv2d(image, kernel),
    }


def _own(x: Tensor, y: Tensor) -> Mapping[str, tuple[Call, float]]:
    """Call and most microseconds."""
    return {
        "round_to fp16": (lambda: halfstep.round_to(x, "fp16"), 15.0),
        "round_blocks mxfp8_e4m3": (lambda: round_blocks(x, "mxfp8_e4m3"), 30.0),
        "quantize_blocks mxfp8_e4m3": (lambda: halfstep.quantize_blocks(x, "mxfp8_e4m3"), 60.0),
        "matmul fp16 in fp16": (lambda: halfstep.matmul(x, y), 60.0),
    }


def _beyond(call: Call, recipe: str, rounds: int) -> list[float]:
    """Microseconds that a call takes longer in the emulation than without it, round by round."""
    beyond: list[float] = []
    for _ in range(rounds):
        (plain,) = _microseconds(call, 1)
        with halfstep.emulate(recipe):
            (emulated,) = _microseconds(call, 1)
        beyond.append(emulated - plain)
    return beyond


def _microseconds(call: Call, rounds: int) -> list[float]:
    """Of one call, in each round, each the best of three runs, in CPU time: others share the machine."""
    call()
    return [min(_run(call) for _ in range(3)) for _ in range(rounds)]


def _run(call: Call) -> float:
    start = time.thread_time()
    for _ in range(_CALLS):
        call()
    return (time.thread_time() - start) / _CALLS * 1e6


def _row(case: str, against: str, figures: list[float], bound: float) -> Row:
    low, median, high = (
        statistics.quantiles(figures, n=4, method="inclusive") if len(figures) > 1 else figures * 3
    )
    return Row(
        case=case,
        against=against,
        figure=Ratio(median=median, low=low, high=high, rounds=len(figures)),
        target=Target(sense=Sense.AT_MOST, bound=bound),
    )
