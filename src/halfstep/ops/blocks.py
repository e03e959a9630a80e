"""Block formats: `quantize_blocks` and `round_blocks`. Checks and gradient; back ends compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingModuleSource]
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
)
from torch.autograd import forward_ad

from halfstep.errors import OperandError
from halfstep.format import BlockFormat, Format, Kind, Rounding
from halfstep.ops import native_blocks
from halfstep.ops.backends import Backend, choose
from halfstep.ops.bit_packing import packed_length, stored_as
from halfstep.ops.block_reference import Parts, scales_shape
from halfstep.ops.block_tensor import BlockTensor
from halfstep.ops.carriers import CARRIERS
from halfstep.ops.custom import (
    block_format_text,
    choice_text,
    constant,
    is_traced,
    operator,
    seed_for,
    straight_through,
    value_of,
)
from halfstep.ops.layout import PLAIN
from halfstep.ops.random_bits import Key, draw_key
from halfstep.ops.rounding import round_to

__all__ = ["block_rounder", "kernel_rounder", "quantize_blocks", "round_blocks"]


def quantize_blocks(
    x: Tensor,
    format: BlockFormat | str,
    dim: int = -1,
    rounding: Rounding | str = "nearest",
    generator: torch.Generator | None = None,
    *,
    backend: Backend | str = Backend.AUTO,
) -> BlockTensor:
    """``x`` in a block format: packed elements and the scales of their blocks.

    ``x`` is float32, float64, float16 or bfloat16, of any shape, layout and device. Blocks lie
    along ``dim``, from its beginning; where its length is no multiple, the last block is shorter, and
    its scale comes from what is there. Tiles have their rows along the last other axis. ``format``:
    ``mxfp8_e4m3 mxfp8_e5m2 mxfp6_e3m2 mxfp6_e2m3 mxfp4 mxint8 nvfp4``, or ``element@block`` such as
    ``e4m3fn@1x128``; see `halfstep.format.BlockFormat.parse`. In the working type (float64 for
    float64, else float32), each operation rounded once::

        amax = max |x| of the block
        scale = format.rule(amax), in format.scale             # 2^(floor(log2 amax) - E) in MX
        element = round(x / (scale * tensor_scale)), saturating    # tensor_scale is 1 but in nvfp4

    nvfp4: tensor_scale = amax of the whole tensor / (6 * 448) as float32, at least 2^-126, and
    scale = amax / 6 / tensor_scale rounded to nearest in e4m3fn.

    - A block with NaN or infinity has the scale NaN, and so is NaN all along; its element codes are
      0, and no other block is touched (MX leaves it to the implementation; there, too,
      a scale of NaN makes all NaN). An error stays visible.
    - A block of zeros has the smallest scale, 2^-127 in e8m0; scales never become 0.
    - -0 and what rounds to 0 from below are -0 where the element has it.
    - The largest elements saturate where the rule allows it (FLOOR, EVEN; any in float64 beyond
      float32's range).

    ``rounding`` of the elements and ``generator`` are those of `halfstep.round_to`, the random bits
    too: element i draws bits i. Scales round as their rule says.

    Gradient: straight through ``quantize_blocks(x, ...).dequantize()``.

    Raises `UnknownNameError` for an unknown format, rounding or backend; `FormatError` for a format that
    cannot be; `OperandError` for a tensor or ``dim`` that it cannot take.

    >>> b = quantize_blocks(torch.tensor([0.1, -0.5, 3.0, 100.0]), "mxfp8_e4m3")
    >>> b.values, b.scales.float()
    (tensor([  0.4062,  -2.0000,  12.0000, 384.0000], dtype=torch.float8_e4m3fn), tensor([0.2500]))

    Source: OCP Microscaling Formats (MX) v1.0; NVIDIA, arXiv 2509.25149.
    """
    if is_traced():
        return _traced_quantize(x, format, dim, rounding, generator, backend)
    format, dim, rounding = _checked("quantize_blocks", x, format, dim, rounding)
    if _is_batched(x):
        raise OperandError(
            "quantize_blocks: x is inside of torch.vmap, where a BlockTensor cannot be; use "
            "halfstep.ops.round_blocks, or quantise the whole batch"
        )
    key = draw_key(generator) if rounding is Rounding.STOCHASTIC else Key()
    with torch.no_grad():
        parts = _parts(x, format, dim, rounding, key, Backend.parse(backend))
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    return BlockTensor(
        values=parts.values,
        scales=parts.scales,
        tensor_scale=parts.tensor_scale,
        format=format,
        shape=x.shape,
        dim=dim,
        dtype=x.dtype,
        _edge=_Edge.apply(x) if wants_grad else torch.empty(0),
    )


def round_blocks(
    x: Tensor,
    format: BlockFormat | str,
    dim: int = -1,
    rounding: Rounding | str = "nearest",
    out: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """``x`` as a block format has it: ``quantize_blocks(x, ...).dequantize()`` in one pass.

    The same numbers, bit for bit, and the same arguments; see `halfstep.quantize_blocks`. New, in
    ``x``'s dtype, or written to ``out`` (same shape, dtype and device; it may be ``x`` itself or
    overlap it). Gradient: straight through.

    >>> round_blocks(torch.tensor([0.1, -0.5, 3.0, 100.0]), "mxfp4")
    tensor([ 0., -0.,  0., 96.])
    """
    if is_traced():
        return _traced_round(x, format, dim, rounding, out, generator, backend)
    format, dim, rounding = _checked("round_blocks", x, format, dim, rounding)
    backend = Backend.parse(backend)
    wants_grad = (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0
    if out is not None:
        _check_out(out, x, wants_grad)
    key = draw_key(generator) if rounding is Rounding.STOCHASTIC else Key()
    arguments = (format, dim, rounding, key, backend)
    if out is not None:
        with torch.no_grad():
            _round_into(out, x, *arguments)
        return out
    return _StraightThrough.apply(x, *arguments) if wants_grad else _rounded(x, *arguments)


def block_rounder(
    format: BlockFormat, first: Format | None = None, *, joined: bool = False
) -> Callable[[Tensor, int], Tensor]:
    """A function that gives ``round_blocks(x, format, dim)`` of tensors that have axes, without a graph.

    With ``first``, of ``round_to(x, first)``; ``joined``: with all axes after ``dim`` as one. For callers
    with many small tensors: what depends on the format alone is decided here.
    """

    def otherwise(x: Tensor, dim: int) -> Tensor:
        if joined:
            return round_blocks(x.flatten(dim + 1), format, dim).view(x.shape)
        return round_blocks(x, format, dim)

    return _rounder(native_blocks.rounder(format, first, joined=joined), first, otherwise)


def kernel_rounder(
    format: BlockFormat, first: Format | None = None
) -> Callable[[Tensor, int], Tensor]:
    """As `block_rounder`, of a convolution's weight (a, b, *positions).

    Tiles span a and b, each position's by itself; ``dim``, 0 or 1, is the axis that blocks lie along.
    """

    def otherwise(x: Tensor, dim: int) -> Tensor:
        n = x.dim()
        turned = x.permute(*range(2, n), 0, 1).contiguous()
        return round_blocks(turned, format, dim - 2).permute(n - 2, n - 1, *range(n - 2))

    return _rounder(native_blocks.kernel_rounder(format, first), first, otherwise)


def _rounder(
    native_one: Callable[[Tensor, int], Tensor | None] | None,
    first: Format | None,
    otherwise: Callable[[Tensor, int], Tensor],
) -> Callable[[Tensor, int], Tensor]:
    """``native_one`` where it takes a tensor, else ``otherwise``."""

    def rounded(x: Tensor, dim: int) -> Tensor:
        if (
            native_one is not None
            and x.dtype is torch.float32
            and type(x) in PLAIN
            and x.is_cpu
            and not (x.is_neg() or is_functorch_wrapped_tensor(x) or is_traced())
        ):
            out = native_one(x, dim)
            if out is not None:
                return out
        x = x.detach()
        return otherwise(x if first is None else round_to(x, first), dim)

    return rounded


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        return _rounded(x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0].clone()


class _Edge(torch.autograd.Function):
    """A tensor of x's shape and one number of memory, through which x gets its gradient."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _is_batched(x: Tensor) -> bool:
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


def _parts(
    x: Tensor, format: BlockFormat, dim: int, rounding: Rounding, key: Key, backend: Backend
) -> Parts:
    source = x if x.dim() else x.reshape(1)
    choice = choose("quantize_blocks", x.device, backend, asked=format.element, tensors=(source,))
    return choice.function(source, format, dim, rounding, key)


def _rounded(x: Tensor, *arguments: Any) -> Tensor:
    out = torch.empty_like(x, requires_grad=False)
    _round_into(out, x, *arguments)
    return out


def _round_into(
    out: Tensor,
    x: Tensor,
    format: BlockFormat,
    dim: int,
    rounding: Rounding,
    key: Key,
    backend: Backend,
) -> None:
    if not x.dim():
        out, x = out.view(1), x.reshape(1)
    choice = choose("round_blocks", x.device, backend, asked=format.element, tensors=(x, out))
    choice.function(out, x, format, dim, rounding, key)


# In a graph; halfstep.ops.custom says how.


def _traced_quantize(
    x: Tensor, format: Any, dim: int, rounding: Any, generator: Any, backend: Any
) -> BlockTensor:
    arguments = _node_arguments(format, dim, rounding, generator, backend)
    values, scales, tensor_scale = _quantize_node(x.detach(), *arguments)
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    return BlockTensor(
        values=values,
        scales=scales,
        tensor_scale=tensor_scale,
        format=_format_object(arguments[0]),
        shape=x.shape,
        dim=dim % max(x.dim(), 1),
        dtype=x.dtype,
        _edge=x if wants_grad else torch.empty(0),
        _text=arguments[0],
    )


def _traced_round(
    x: Tensor,
    format: Any,
    dim: int,
    rounding: Any,
    out: Tensor | None,
    generator: Any,
    backend: Any,
) -> Tensor:
    arguments = _node_arguments(format, dim, rounding, generator, backend)
    if out is None:
        return _round_node(x, *arguments)
    _check_out(out, x, torch.is_grad_enabled() and x.requires_grad)
    _writing_node(out, x, *arguments)
    return out


def _node_arguments(
    format: Any, dim: int, rounding: Any, generator: Any, backend: Any
) -> tuple[str, int, str, Tensor | None, str]:
    rounding = choice_text(rounding)
    seed = seed_for(generator) if rounding == Rounding.STOCHASTIC.value else None
    return block_format_text(format), dim, rounding, seed, choice_text(backend)


@constant
def _format_object(text: str) -> BlockFormat:
    return value_of(text, BlockFormat.parse)


_Given = tuple[BlockFormat, int, Rounding, Key, Backend]


def _meant(
    op: str, x: Tensor, format: str, dim: int, rounding: str, seed: Tensor | None, backend: str
) -> _Given:
    """What the plain values of a node mean, checked."""
    checked = _checked(op, x, value_of(format, BlockFormat.parse), dim, rounding)
    return *checked, Key() if seed is None else Key.from_seed(int(seed)), Backend.parse(backend)


def _eager_quantize(x: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    parts = _parts(x, *_meant("quantize_blocks", x, *values))
    return parts.values, parts.scales, parts.tensor_scale


def _eager_round(x: Tensor, *values: Any) -> Tensor:
    return _rounded(x, *_meant("round_blocks", x, *values))


def _eager_into(out: Tensor, x: Tensor, *values: Any) -> None:
    _round_into(out, x, *_meant("round_blocks", x, *values))


def _fake_quantize(
    x: Tensor, format: str, dim: int, rounding: str, _: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    given = _meant("quantize_blocks", x, format, dim, rounding, None, backend)
    it, dim = given[:2]
    shape = x.shape or torch.Size([1])
    packed = list(shape)
    if it.element.bits < 8:
        packed[dim] = packed_length(shape[dim], it.element.bits)
    return (
        x.new_empty(packed, dtype=stored_as(it.element)),
        x.new_empty(scales_shape(shape, it, dim), dtype=stored_as(it.scale)),
        x.new_empty((), dtype=torch.float32),
    )


def _fake_round(
    x: Tensor, format: str, dim: int, rounding: str, _: Tensor | None, backend: str
) -> Tensor:
    _meant("round_blocks", x, format, dim, rounding, None, backend)
    return torch.empty_like(x)


def _fake_into(
    out: Tensor, x: Tensor, format: str, dim: int, rounding: str, _: Tensor | None, backend: str
) -> None:
    _meant("round_blocks", x, format, dim, rounding, None, backend)


def _batched(info: Any, in_dims: Any, x: Tensor, *values: Any) -> tuple[Tensor, int]:
    """Every example is rounded as it would be alone: a block, or a scale, is of one of them."""
    return torch.stack([_round_node(example, *values) for example in x.unbind(in_dims[0])]), 0


_SCHEMA = "str format, int dim, str rounding, Tensor? seed, str backend"
_quantize_node = operator(
    "quantize_blocks",
    f"(Tensor x, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _eager_quantize,
    fake=_fake_quantize,
)
_round_node = operator(
    "round_blocks",
    f"(Tensor x, {_SCHEMA}) -> Tensor",
    _eager_round,
    fake=_fake_round,
    backward=straight_through(6),
    batched=_batched,
)
_writing_node = operator(
    "round_blocks_into",
    f"(Tensor(a!) out, Tensor x, {_SCHEMA}) -> ()",
    _eager_into,
    fake=_fake_into,
    mutates=("out",),
)


def _checked(
    op: str, x: object, format: object, dim: int, rounding: object
) -> tuple[BlockFormat, int, Rounding]:
    format = BlockFormat.parse(format)
    rounding = Rounding.parse(rounding)
    if not isinstance(x, Tensor) or x.dtype not in CARRIERS or x.layout is not torch.strided:
        given = f"{x.dtype} ({x.layout})" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise OperandError(
            f"{op}: x is {given}; allowed: a dense tensor of float32, float64, float16 or bfloat16"
        )
    length = max(x.dim(), 1)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -length <= dim < length:
        raise OperandError(
            f"{op}: dim {dim!r} of x with shape {tuple(x.shape)}; allowed: {-length} to {length - 1}"
        )
    possible = (Rounding.NEAREST, Rounding.STOCHASTIC)
    if format.element.kind is Kind.BINARY and rounding not in possible:
        raise OperandError(
            f"{op}: binary has no rounding {rounding.value!r}; allowed: nearest, stochastic"
        )
    return format, dim % length, rounding


def _check_out(out: object, x: Tensor, wants_grad: bool) -> None:
    if not isinstance(out, Tensor):
        raise OperandError(f"round_blocks: out is a {type(out).__name__}; allowed: a torch.Tensor")
    if (out.shape, out.dtype, out.device, out.layout) != (x.shape, x.dtype, x.device, x.layout):
        raise OperandError(
            f"round_blocks: out is {out.dtype} {tuple(out.shape)} on {out.device} ({out.layout}); "
            f"it must be as x: {x.dtype} {tuple(x.shape)} on {x.device} ({x.layout})"
        )
    if not out.is_contiguous() and any(
        s == 0 and size > 1 for s, size in zip(out.stride(), out.shape, strict=True)
    ):
        raise OperandError(
            f"round_blocks: out has stride {out.stride()}: several elements share one place, "
            "as after expand(); pass out.contiguous() or no out"
        )
    if wants_grad or (torch.is_grad_enabled() and out.requires_grad):
        raise OperandError(
            "round_blocks: out= cannot be differentiated; leave it away, or use torch.no_grad()"
        )
