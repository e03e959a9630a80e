"""Dot products as the rule has them, where the device has no kernel for it.

Operands are rounded to the low dtype and carried in FP32, so every product is exact; an FP32 kernel adds;
the result is rounded once. The casts are torch's own and so are their derivatives: in the backward each
incoming gradient is on the low dtype's grid, goes through the FP32 kernel, and is rounded once on its way
out. That is rule 1 for all three products of a layer, with no backward written by hand.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfstep.errors import SwitchError
from halfstep.format import Accumulator
from halfstep.switching.operands import Product
from halfstep.switching.products import (
    FP32_SUMS,
    convolution,
    matmul,
    repeated_rows,
    rows,
    wide_rows,
)
from halfstep.switching.tracing import is_tracing

__all__ = ["Carriers", "Emulator", "attention", "dot"]

_CASTABLE = (torch.float16, torch.bfloat16, torch.float32)


class Emulator:
    """Rounds operands and results to one dtype; multiplies with one accumulator."""

    __slots__ = ("accumulate", "low")

    def __init__(self, low: torch.dtype, accumulate: Accumulator) -> None:
        self.low = low
        self.accumulate = accumulate

    def lowered(self, t: Tensor) -> Tensor:
        """``t`` in the low dtype; integers, booleans, FP64 and complex are left alone."""
        return t.to(self.low) if t.dtype in _CASTABLE else t

    def operand(self, t: Tensor) -> Tensor:
        """``t`` on the low dtype's grid, carried in FP32."""
        if t.dtype not in _CASTABLE:
            return t
        return t.to(self.low).to(torch.float32)

    def store(self, t: Tensor) -> Tensor:
        """A result, rounded once."""
        return t.to(self.low) if t.dtype == torch.float32 else t

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` in this accumulator, operands rounded first; FP32, not rounded to the store format."""
        carriers = Carriers(self)
        a, b = carriers.of(a), carriers.of(b)
        with carriers.kept_low():
            return matmul(a, b, self.accumulate)

    def of_layer(self, weight: Tensor) -> Emulator:
        """The emulator for one recurrent layer, which is called by its first weight."""
        return self

    def rows(self, a: Tensor, b: Tensor, product: Product = Product.FORWARD) -> Tensor:
        """``a @ b.T`` of FP32 carriers (M, K) and (N, K), likewise; without a graph.

        ``product`` says the roles of the two, which here are rounded alike.
        """
        return wide_rows(a, b, self.accumulate)

    def repeated(
        self, b: Tensor, count: int, product: Product = Product.FORWARD
    ) -> Callable[[Tensor], Tensor]:
        """`rows` with one ``b``, to be called for many ``a`` of about ``count`` rows."""
        return repeated_rows(b, count, self.accumulate)


class Carriers:
    """Operands of one product as FP32 carriers, of which a graph keeps the 16-bit originals.

    A carrier is on the low dtype's grid, so what it was made of says all: the backward makes it again,
    and activations are held in 16 bits as on hardware that has the format.
    """

    __slots__ = ("_emulator", "_lows")

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._lows: dict[int, Tensor] = {}

    def of(self, t: Tensor) -> Tensor:
        """``t`` on the low dtype's grid, carried in FP32."""
        if t.dtype not in _CASTABLE:
            return t
        low = t.to(self._emulator.low)
        carrier = low.to(torch.float32)
        if is_tracing():
            return carrier
        self._lows[carrier.untyped_storage().data_ptr()] = low.detach()
        return carrier

    def kept_low(self) -> Any:
        """A context in which the graph keeps originals for carriers, and views of them.

        A graph of torch.compile chooses itself what it keeps.
        """
        if is_tracing():
            return contextlib.nullcontext()
        lows = self._lows

        def pack(t: Tensor) -> Any:
            low = lows.get(t.untyped_storage().data_ptr())
            if low is None or t.dtype != torch.float32:
                return t
            return low, t.size(), t.stride(), t.storage_offset()

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            low, size, stride, offset = kept
            return low.to(torch.float32).as_strided(size, stride, offset)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def attention(
    emulator: Emulator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention as half-precision flash kernels have it.

    Scores and softmax stay in FP32; the probabilities are rounded to the low dtype, since they are an
    operand of the second product (Dao et al., arXiv 2205.14135, algorithm 1).
    Shapes: query (..., heads, L, E), key (..., heads, S, E), value (..., heads, S, Ev).
    """
    q, k, v = (emulator.lowered(t) for t in (query, key, value))
    if enable_gqa:
        k = k.repeat_interleave(q.size(-3) // k.size(-3), -3)
        v = v.repeat_interleave(q.size(-3) // v.size(-3), -3)
    factor = 1.0 / math.sqrt(q.size(-1)) if scale is None else scale
    scores = emulator.matmul(q, k.transpose(-2, -1)) * factor
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask.float()
    probabilities = torch.softmax(scores, dim=-1)
    if dropout_p > 0.0:
        probabilities = F.dropout(probabilities, dropout_p)
    return emulator.store(emulator.matmul(probabilities, v))


def dot(
    emulator: Emulator,
    op: torch._ops.OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    otherwise: Callable[[], Tensor],
) -> Tensor:
    """The dot product ``op`` in the recipe's accumulator, operands rounded, result rounded once.

    ``otherwise`` computes ``op`` on FP32 carriers with FP32 sums, for what is no plain matrix product.

    Raises:
        SwitchError: the accumulator is narrow and no such product is known; it is never FP32 instead.
    """
    name: str = op._schema.name.removeprefix("aten::")
    low: Any = emulator.lowered
    if name == "linear":
        x, weight, bias = (*args, None)[:3]
        return rows(low(x), low(weight), None if bias is None else low(bias), emulator)
    if name in ("mm", "matmul") and args[1].dim() == 2 and args[0].dim() >= 1:
        return rows(low(args[0]), low(args[1]).t(), None, emulator)
    if name == "addmm" and not kwargs and args[0].dim() == 1:
        return rows(low(args[1]), low(args[2]).t(), low(args[0]), emulator)
    if emulator.accumulate == FP32_SUMS:
        return emulator.store(otherwise())
    wide = emulator.operand
    if name in ("bmm", "matmul", "mv"):
        return emulator.store(emulator.matmul(args[0], args[1]))
    if name in ("addmm", "baddbmm", "addmv"):
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        added = emulator.matmul(args[1], args[2])
        return emulator.store(beta * wide(args[0]) + alpha * added)
    convolve = convolution(name, args)
    if convolve is not None:
        x, weight, bias, *_ = (*args, None)
        carriers = Carriers(emulator)
        x, weight = carriers.of(x), carriers.of(weight)
        with carriers.kept_low():
            out = convolve(x, weight, None if bias is None else wide(bias), emulator.accumulate)
        return emulator.store(out)
    raise SwitchError(
        f"{op} has no kernel that adds in {emulator.accumulate}; "
        "use a recipe with accumulate=fp32 for this model"
    )
