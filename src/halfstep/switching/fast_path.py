"""torch's fused encoder kernel, shut while any region is open: it reads the masters and knows no autocast."""

from __future__ import annotations

import threading

import torch

__all__ = ["allow", "forbid"]

_lock = threading.Lock()
_regions = 0
_before = True


def forbid() -> None:
    """One more region is open. The flag is the process's, so regions on several threads are counted."""
    global _regions, _before
    with _lock:
        if _regions == 0:
            _before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _regions += 1


def allow() -> None:
    """One region less; the last one puts the flag back."""
    global _regions
    with _lock:
        _regions -= 1
        if _regions == 0:
            torch.backends.mha.set_fastpath_enabled(_before)
