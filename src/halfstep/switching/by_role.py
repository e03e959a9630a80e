"""Which product an operation is, for `RoledEmulator`: matrix products, convolutions, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from halfstep.errors import SwitchError
from halfstep.switching.operands import Role, Site
from halfstep.switching.products import FP32_SUMS, convolution
from halfstep.switching.roled import RoledEmulator, clipped, rounded

__all__ = ["dot_by_role"]

_CHANNELS = 1
_BATCH = 0


def dot_by_role(
    emulator: RoledEmulator,
    op: torch._ops.OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """The dot product ``op`` with operands rounded by role, result rounded once to the store dtype.

    Raises:
        SwitchError: the accumulator is narrow and no such product is known; it is never FP32 instead.
    """
    name: str = op._schema.name.removeprefix("aten::")
    wide = emulator.operand
    if name == "linear":
        return emulator.linear(args[0], args[1], args[2] if len(args) > 2 else None)
    if name in ("mm", "bmm", "matmul", "mv"):
        return emulator.multiplied(args[0], args[1])
    if name in ("addmm", "baddbmm", "addmv"):
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        added = emulator.matmul(args[1], args[2])
        return emulator.store((beta * wide(args[0]) if beta else 0) + alpha * added)
    convolve = convolution(name, args)
    if convolve is not None:
        return _convolved(emulator, name, args, convolve)
    if emulator.accumulate != FP32_SUMS:
        raise SwitchError(
            f"{op} has no kernel that adds in {emulator.accumulate}; "
            "use a recipe with accumulate=fp32 for this model"
        )
    return emulator.store(_rest(emulator, op, name, args, kwargs))


def _rest(
    emulator: RoledEmulator,
    op: torch._ops.OpOverload,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """addbmm, addr, linalg_vecdot, conv_tbc: operands rounded along their last axis."""
    if name in ("addbmm", "addr"):
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        a, b = args[1], args[2]
        if name == "addr":
            added = emulator.matmul(a.unsqueeze(1), b.unsqueeze(0))
        else:
            added = emulator.matmul(a, b).sum(0)
        return (beta * emulator.operand(args[0]) if beta else 0) + alpha * added
    first, second, *more = args
    return emulator.along(-1, [first, second], lambda a, b: op(a, b, *more, **kwargs))


def _convolved(
    emulator: RoledEmulator, name: str, args: tuple[Any, ...], convolve: Callable[..., Tensor]
) -> Tensor:
    x, weight, bias, *_ = (*args, None)
    x, weight = emulator.lowered(x), emulator.lowered(weight)
    dims = weight.dim() - 2
    batched = x if x.dim() == dims + 2 else x.unsqueeze(0)
    site = emulator.site(weight)
    if emulator.accumulate == FP32_SUMS:
        batched = _evened(name, batched, args, dims)
        geometry = _geometry(name, args, dims)
        out: Any = _Convolved.apply(batched, weight, emulator, site, geometry)
    else:
        # One graph for all three products: blocks lie along the channels in each.
        wide_x = _plane(
            batched,
            _CHANNELS,
            lambda t: rounded(t, Role.ACTIVATION, _CHANNELS, site, emulator),
        )
        wide_w = _rounded_weight(emulator, weight, _CHANNELS, site, graph=True)
        out = convolve(wide_x, wide_w, None, emulator.accumulate)
        out = _plane(out, _CHANNELS, lambda t: emulator.gradient_rounded(t, _CHANNELS, site))
    if bias is not None:
        out = out + emulator.operand(bias).view(-1, *[1] * dims)
    out = emulator.store(out)
    return out if x.dim() == dims + 2 else out.squeeze(0)


def _evened(name: str, x: Tensor, args: tuple[Any, ...], dims: int) -> Tensor:
    """A convolution's input; with ``padding="same"`` one zero more behind an odd span, as torch has it."""
    if "transpose" in name or len(args) < 5 or args[4] != "same":
        return x
    dilation = list(args[5]) if len(args) > 5 else [1]
    dilation = dilation * dims if len(dilation) == 1 else dilation
    odd = [d * (k - 1) % 2 for d, k in zip(dilation, args[1].shape[2:], strict=True)]
    return F.pad(x, [n for more in reversed(odd) for n in (0, more)]) if any(odd) else x


# stride, padding, dilation, transposed, output padding, groups: as aten::convolution takes them
_Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]


def _geometry(name: str, args: tuple[Any, ...], dims: int) -> _Geometry:
    """How a convolution lies; one with ``padding="same"`` after `_evened`."""
    rest = list(args[3:])

    def sizes(k: int, default: int) -> Any:
        given = rest[k] if k < len(rest) else default
        if isinstance(given, str):
            return given
        given = [given] if isinstance(given, int) else list(given)
        return given * dims if len(given) == 1 else given

    def groups(k: int) -> int:
        return rest[k] if k < len(rest) else 1

    if name in ("convolution", "_convolution"):
        return sizes(0, 1), sizes(1, 0), sizes(2, 1), bool(rest[3]), sizes(4, 0), rest[5]
    if "transpose" in name:
        return sizes(0, 1), sizes(1, 0), sizes(4, 1), True, sizes(2, 0), groups(3)
    stride, padding, dilation = sizes(0, 1), sizes(1, 0), sizes(2, 1)
    if padding == "valid":
        padding = [0] * dims
    elif padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, args[1].shape[2:], strict=True)]
        padding = [span // 2 for span in spans]  # an odd span is padded before: see `_evened`
    return stride, padding, dilation, False, [0] * dims, groups(3)


class _Convolved(Function):
    """A convolution in FP32 sums: blocks along the channels forward, and along the batch for the weight.

    ::

        output = conv(Q(x), Q(w))               blocks along input channels
        grad_x = conv'(Q(grad), Q(w))           blocks along output channels
        grad_w = conv''(Q(grad), Q(x))          blocks along the batch

    A tile of a weight spans input and output channels, at one position of the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, emulator: RoledEmulator, site: Site, geometry: _Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.emulator, ctx.site, ctx.geometry = emulator, site, geometry
        inputs = 0 if geometry[3] else 1
        qx = _plane(x, _CHANNELS, lambda t: emulator.rounded(t, Role.ACTIVATION, _CHANNELS, site))
        qw = _rounded_weight(emulator, w, inputs, site)
        return torch.ops.aten.convolution(qx, qw, None, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        emulator, site, geometry = ctx.emulator, ctx.site, ctx.geometry
        need_x, need_w = ctx.needs_input_grad[:2]
        outputs = 1 if geometry[3] else 0
        again = torch.is_grad_enabled()

        def lowered(t: Tensor, role: Role, dim: int) -> Any:
            if again:
                return _plane(t, dim, lambda t: rounded(t, role, dim, site, emulator))
            return _plane(t, dim, lambda t: emulator.rounded(t, role, dim, site))

        def back(grad: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward(grad, x, w, None, *geometry, mask)

        (grad,) = grads
        of_x = of_w = None
        if need_x:
            g = lowered(grad, Role.GRADIENT, _CHANNELS)
            qw = _rounded_weight(emulator, w, outputs, site, graph=again)
            if need_w and emulator.operands.ignores_axes:
                qx = lowered(x, Role.ACTIVATION, _CHANNELS)
                of_x, of_w, _ = back(g, qx, qw, [True, True, False])
            else:
                of_x = back(g, x.float(), qw, [True, False, False])[0]
        if need_w and of_w is None:
            g, qx = grad, x
            if emulator.operands.hadamard:
                g, qx = _transformed_batch(emulator, grad, x)
            g = lowered(g, Role.GRADIENT, _BATCH)
            qx = lowered(qx, Role.ACTIVATION, _BATCH)
            of_w = back(g, qx, w.float(), [False, True, False])[1]
        if of_x is not None:
            of_x = clipped(of_x.to(emulator.low), x, Role.ACTIVATION, emulator)
        if of_w is not None:
            of_w = clipped(of_w.to(emulator.low), w, Role.WEIGHT, emulator)
        return of_x, of_w, None, None, None


def _transformed_batch(emulator: RoledEmulator, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands of a weight gradient after the Hadamard transform along the batch."""
    a, b = emulator.operands.transformed(grad.flatten(1).t(), x.flatten(1))
    return a.t().reshape(-1, *grad.shape[1:]), b.reshape(-1, *x.shape[1:])


def _rounded_weight(
    emulator: RoledEmulator, w: Tensor, dim: int, site: Site, *, graph: bool = False
) -> Any:
    """A convolution's weight (.., .., *kernel), tiles over its first two axes."""
    if emulator.operands.ignores_axes:
        turned = w
    else:
        turned = w.permute(*range(2, w.dim()), 0, 1).contiguous()
        dim -= 2
    if graph:
        out: Any = rounded(turned, Role.WEIGHT, dim, site, emulator)
    else:
        out = emulator.rounded(turned, Role.WEIGHT, dim, site)
    return out if turned is w else out.permute(w.dim() - 2, w.dim() - 1, *range(w.dim() - 2))


def _plane(t: Tensor, dim: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``change`` of an activation (N, C, *positions) whose axes after ``dim`` are one: tiles span them."""
    return change(t.flatten(dim + 1)).view(t.shape)
