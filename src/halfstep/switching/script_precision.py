"""A script's own mixed precision: inside the models the recipe decides, and no loss is scaled twice."""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from halfstep.switching.region import current

__all__ = ["ScriptPrecision"]

# Who enters torch.autocast without being the script.
_MACHINERY = ("halfstep.", "torch.utils.checkpoint")


class ScriptPrecision:
    """``torch.autocast`` and ``torch.amp.GradScaler`` as a launched script meets them.

    An autocast that is entered inside a region keeps its meaning (on, or an FP32 island) and takes the
    recipe's dtype; in a model of recipe ``fp32`` it is off. Outside of the models it is the script's.
    A scaler is switched off once something ``is_switched``: ``scale``, ``unscale_``, ``step`` and ``update``
    then do what torch has them do for ``enabled=False``.
    """

    def __init__(self, is_switched: Callable[[], bool]) -> None:
        self.autocast = False
        self.grad_scaler = False
        self._is_switched = is_switched
        self._local = threading.local()
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Put both in place, until `remove`."""
        self._undo = [self._patch_autocast(), self._patch_scaler()]

    def remove(self) -> None:
        """torch's own again."""
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def forbidden(self, device: str) -> Iterator[None]:
        """Without autocast, whatever the script enters meanwhile."""
        before = getattr(self._local, "forbidden", False)
        with torch.autocast(device, enabled=False):
            self._local.forbidden = True
            try:
                yield
            finally:
                self._local.forbidden = before

    def _patch_autocast(self) -> Callable[[], None]:
        original = torch.autocast.__enter__

        @functools.wraps(original)
        def enter(autocast: Any) -> Any:
            self.autocast |= autocast._enabled and _is_script(sys._getframe(1))
            given = autocast.fast_dtype, autocast._enabled
            region = current()
            if region is not None and autocast.device == region.plan.device:
                autocast.fast_dtype = region.plan.low
            elif getattr(self._local, "forbidden", False):
                autocast._enabled = False
            try:
                return original(autocast)
            finally:
                autocast.fast_dtype, autocast._enabled = given

        torch.autocast.__enter__ = enter  # pyright: ignore[reportAttributeAccessIssue]

        def undo() -> None:
            torch.autocast.__enter__ = original

        return undo

    def _patch_scaler(self) -> Callable[[], None]:
        original: Any = GradScaler.scale

        @functools.wraps(original)
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            # Off, and made for CUDA: torch has switched it off where there is no GPU. Else it is not meant.
            self.grad_scaler |= scaler._enabled or scaler._device == "cuda"
            if self._is_switched():
                scaler._enabled = False
            return original(scaler, outputs)

        GradScaler.scale = scale  # pyright: ignore[reportAttributeAccessIssue]

        def undo() -> None:
            GradScaler.scale = original

        return undo


def _is_script(frame: types.FrameType | None) -> bool:
    """True where ``frame`` enters autocast for the script or a library of its, through contextlib perhaps."""
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":
        frame = frame.f_back
    return frame is None or not str(frame.f_globals.get("__name__")).startswith(_MACHINERY)
