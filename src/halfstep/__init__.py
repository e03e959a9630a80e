"""Mixed-precision training by one switch, and the arithmetic behind it.

``import halfstep`` is light: torch is imported when the first name that needs it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares the two lists
    from halfstep.format import Format as Format
    from halfstep.format import formats as formats
    from halfstep.ops import BlockTensor as BlockTensor
    from halfstep.ops import conv1d as conv1d
    from halfstep.ops import conv2d as conv2d
    from halfstep.ops import conv3d as conv3d
    from halfstep.ops import conv_transpose1d as conv_transpose1d
    from halfstep.ops import conv_transpose2d as conv_transpose2d
    from halfstep.ops import conv_transpose3d as conv_transpose3d
    from halfstep.ops import matmul as matmul
    from halfstep.ops import quantize_blocks as quantize_blocks
    from halfstep.ops import round_to as round_to
    from halfstep.recipe import Recipe as Recipe
    from halfstep.recipe import recipes as recipes
    from halfstep.switching import GradScaler as GradScaler
    from halfstep.switching import autocast as autocast
    from halfstep.switching import emulate as emulate
    from halfstep.switching import switch as switch

__version__ = "0.1.0"

# public name -> the module it lives in
_PUBLIC: dict[str, str] = {
    "BlockTensor": "halfstep.ops",
    "Format": "halfstep.format",
    "GradScaler": "halfstep.switching",
    "Recipe": "halfstep.recipe",
    "autocast": "halfstep.switching",
    "conv1d": "halfstep.ops",
    "conv2d": "halfstep.ops",
    "conv3d": "halfstep.ops",
    "conv_transpose1d": "halfstep.ops",
    "conv_transpose2d": "halfstep.ops",
    "conv_transpose3d": "halfstep.ops",
    "emulate": "halfstep.switching",
    "formats": "halfstep.format",
    "matmul": "halfstep.ops",
    "quantize_blocks": "halfstep.ops",
    "recipes": "halfstep.recipe",
    "round_to": "halfstep.ops",
    "switch": "halfstep.switching",
}

# packages that documents and errors name in full: halfstep.ops.round_blocks, halfstep.errors.OperandError
_PACKAGES = ("diagnosis", "errors", "format", "ops", "recipe", "study", "switching")

__all__ = sorted(["__version__", *_PUBLIC])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"halfstep.{name}")
    raise AttributeError(f"module 'halfstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
