"""How much memory a call takes beside its operands and its result, measured in a fresh process."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from typing import Any

import torch

from halfstep.ops import matmul

__all__ = ["beyond_operands", "can_measure"]

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def can_measure() -> bool:
    """Whether this system tells the peak of a process and lets it be reset: Linux does."""
    return _RESET.exists()


def beyond_operands(
    a_shape: tuple[int, ...], b_shape: tuple[int, ...], keywords: dict[str, Any]
) -> float:
    """MiB at the peak of ``matmul(a, b, **keywords)`` above what was there before and its result."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (a_shape, b_shape, keywords))


def _measure(a_shape: tuple[int, ...], b_shape: tuple[int, ...], keywords: dict[str, Any]) -> float:
    matmul(
        torch.ones(64, 64), torch.ones(64, 64), **keywords
    )  # threads and tables of the first call
    a, b = torch.randn(a_shape), torch.randn(b_shape)
    _RESET.write_text("5")  # the peak is now what is resident
    before = _kib("VmRSS")
    result = matmul(a, b, **keywords)
    return (_kib("VmHWM") - before) / 2**10 - result.nbytes / 2**20


def _kib(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) if found else 0
