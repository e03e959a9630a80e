"""Delayed scaling: the scale of a tensor from the largest magnitudes of past steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import SwitchError

__all__ = ["AmaxHistories"]


class AmaxHistories:
    """One history for each tensor of each dot product, by name; kept by a switch from step to step.

    With ``largest`` the largest element of the format and ``window`` past steps::

        scale(t) = max(amax(t - window) ... amax(t - 1)) / largest     # 1 before there is one
        amax(t)  = the largest magnitude seen in step t

    A step ends where the next forward with a graph begins. A magnitude that is not finite is not kept: it
    would stay the largest for a whole window.

    Source: NVIDIA Transformer Engine, recipe DelayedScaling (amax_compute_algo "max", margin 0, history of
    1024).
    """

    __slots__ = ("_now", "_past", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self._past: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}

    def scale(self, site: str, largest: float, device: torch.device) -> Tensor:
        """What elements of the tensor at ``site`` are multiples of in this step: FP32, of shape ()."""
        past = self._past.get(site)
        if past is None:
            return torch.ones((), device=device)
        scale = past.to(device).max() / largest
        return torch.where(scale > 0, scale, 1.0)

    def note(self, site: str, amax: Tensor) -> None:
        """Take in the largest magnitude of a tensor."""
        amax = torch.where(amax.isfinite(), amax, 0.0)
        known = self._now.get(site)
        self._now[site] = amax if known is None else torch.maximum(known, amax.to(known.device))

    def roll(self) -> None:
        """A new step: what was seen in the last one becomes history."""
        for site, amax in self._now.items():
            past = self._past.get(site)
            new = amax.reshape(1)
            self._past[site] = new if past is None else torch.cat([past, new])[-self.window :]
        self._now.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The histories, the step that is not over included; oldest first."""
        again = AmaxHistories(self.window)
        again._past, again._now = dict(self._past), dict(self._now)
        again.roll()
        return {site: past.clone() for site, past in again._past.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises:
            SwitchError: a history is no tensor of one axis.
        """
        for site, past in state.items():
            if not (isinstance(past, Tensor) and past.dim() == 1 and len(past)):
                raise SwitchError(f"switch state: the history of {site!r} is no tensor of one axis")
        self._past = {site: past[-self.window :].float().clone() for site, past in state.items()}
        self._now.clear()
