"""What others do, where they are installed: contestants for the table of the arithmetic.

Each takes a float32 tensor and returns a call without arguments; what can be prepared, is.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfstep.ops import quantize_blocks, round_to

__all__ = ["BLOCKS", "ROUNDERS", "Peer", "present", "quiet"]

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A package, what it computes, and how each side is called on a tensor."""

    package: str
    case: str
    function: str
    theirs: Callable[[Tensor], Call]
    ours: Callable[[Tensor], Call]
    at_least: float = 1.0
    """How many times faster ours must be."""


def present(peer: Peer, x: Tensor) -> Call | None:
    """Its call on ``x``, made once; None where the package is not installed or does not load.

    What the package says while it loads is kept from the table.
    """
    try:
        importlib.metadata.version(peer.package)
        with quiet():
            call = peer.theirs(x)
            call()
    except (importlib.metadata.PackageNotFoundError, ImportError, OSError, RuntimeError):
        return None
    return call


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context in which what a package says while it loads is kept from the table."""
    said = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(said),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _rounding(format: str) -> Callable[[Tensor], Call]:
    def ours(x: Tensor) -> Call:
        out = torch.empty_like(x)
        return lambda: round_to(x, format, out=out)

    return ours


def _quantizing(format: str) -> Callable[[Tensor], Call]:
    def ours(x: Tensor) -> Call:
        return lambda: quantize_blocks(x.view(-1, 1024), format)

    return ours


def _torch(x: Tensor) -> Call:
    return lambda: x.to(torch.float8_e5m2).float()


def _ml_dtypes(x: Tensor) -> Call:
    import ml_dtypes

    array = x.numpy()
    return lambda: array.astype(ml_dtypes.float8_e4m3fn).astype("float32")


def _qtorch(x: Tensor) -> Call:
    from qtorch.quant import float_quantize  # pyright: ignore[reportMissingImports]

    return lambda: float_quantize(x, exp=6, man=9, rounding="nearest")


def _gfloat(x: Tensor) -> Call:
    import gfloat  # pyright: ignore[reportMissingImports]
    from gfloat.formats import format_info_binary16  # pyright: ignore[reportMissingImports]

    array = x.numpy()
    return lambda: gfloat.round_ndarray(format_info_binary16, array)


def _apytypes(x: Tensor) -> Call:
    import apytypes  # pyright: ignore[reportMissingImports]

    array = apytypes.APyFloatArray.from_array(x.numpy(), 8, 23)
    return lambda: array.cast(6, 9)


def _to_mx(element: str) -> Callable[[Tensor], Call]:
    def theirs(x: Tensor) -> Call:
        from torchao.prototype.mx_formats.mx_tensor import (  # pyright: ignore[reportMissingImports]
            to_mx,
        )

        rows, dtype = x.view(-1, 1024), getattr(torch, element)
        return lambda: to_mx(rows, dtype, 32)

    return theirs


def _nvfp4(x: Tensor) -> Call:
    from torchao.prototype.mx_formats.nvfp4_tensor import (  # pyright: ignore[reportMissingImports]
        nvfp4_quantize,
    )

    rows = x.view(-1, 1024)
    return lambda: nvfp4_quantize(rows, 16)


ROUNDERS = (
    Peer(
        package="torch",
        case="round_to e5m2",
        function="to(float8_e5m2).float()",
        theirs=_torch,
        ours=_rounding("e5m2"),
    ),
    Peer(
        package="ml_dtypes",
        case="round_to e4m3fn",
        function="astype",
        theirs=_ml_dtypes,
        ours=_rounding("e4m3fn"),
    ),
    Peer(
        package="qtorch",
        case="round_to e6m9",
        function="float_quantize",
        theirs=_qtorch,
        ours=_rounding("e6m9"),
    ),
    Peer(
        package="gfloat",
        case="round_to fp16",
        function="round_ndarray",
        theirs=_gfloat,
        ours=_rounding("fp16"),
    ),
    Peer(
        package="apytypes",
        case="round_to e6m9",
        function="cast",
        theirs=_apytypes,
        ours=_rounding("e6m9"),
    ),
)
BLOCKS = (
    Peer(
        package="torchao",
        case="quantize_blocks mxfp8_e4m3",
        function="to_mx",
        theirs=_to_mx("float8_e4m3fn"),
        ours=_quantizing("mxfp8_e4m3"),
        at_least=10.0,
    ),
    Peer(
        package="torchao",
        case="quantize_blocks mxfp4",
        function="to_mx",
        theirs=_to_mx("float4_e2m1fn_x2"),
        ours=_quantizing("mxfp4"),
        at_least=10.0,
    ),
    Peer(
        package="torchao",
        case="quantize_blocks nvfp4",
        function="nvfp4_quantize",
        theirs=_nvfp4,
        ours=_quantizing("nvfp4"),
        at_least=10.0,
    ),
)
