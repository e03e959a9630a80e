"""Matrix products of operands that are rounded first: one node of graphs, its gradient two more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from halfstep.errors import OperandError
from halfstep.format import Accumulator, Format, Rounding
from halfstep.ops import native
from halfstep.ops.arithmetic import (
    NO_KEY,
    Arithmetic,
    check_steps,
    key_for,
    key_of_node,
    next_key,
    seed_of_node,
)
from halfstep.ops.backends import Backend, Choice, choose
from halfstep.ops.carriers import holds
from halfstep.ops.custom import operator, outside_graphs
from halfstep.ops.integer_sums import result_dtype
from halfstep.ops.random_bits import Key
from halfstep.ops.rounding import round_into
from halfstep.ops.sparsity import Sparse, compressed

__all__ = ["derives", "each", "is_transformed", "multiply", "on_grid", "plain_multiply", "product"]

_COPIED = (
    2**23
)  # the most numbers of operands that are rounded whole; else in parts of half as many
_GATHERED = 2**22  # numbers of the right operand that are gathered at once for a sparse left one


def product(
    a: Tensor,
    b: Tensor,
    initial: Tensor | None,
    how: Arithmetic | str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``a @ b + initial``, the operands rounded; checks are the caller's. ``how`` is text in a graph.

    ``a`` (..., M, K) and ``b`` (..., K, N) broadcast, ``initial`` broadcasts to the result; +0 if None.
    """
    if isinstance(how, str):
        return _node(a, b, initial, how, seed_of_node(how, generator), [])
    key = key_for("matmul", how, a.shape[-1], generator)
    if derives(a, b, *([] if initial is None else [initial])) or is_transformed():
        return _derived(a, b, initial, how, key)
    return _product(a, b, initial, how, key)


def _derived(*arguments: Any) -> Any:
    return (_Transformed if is_transformed() else _Product).apply(*arguments)


def is_transformed() -> bool:
    """True inside of a transform of torch.func, and where forward-mode derivatives are asked for."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def derives(*tensors: Tensor) -> bool:
    """True where a derivative by any of these may be asked for."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return wanted or forward_ad._current_level >= 0


def _product(
    a: Tensor, b: Tensor, initial: Tensor | None, arithmetic: Arithmetic, key: Key
) -> Tensor:
    wide = torch.float64 in (a.dtype, b.dtype)
    if a.numel() + b.numel() <= _COPIED or _copied(a, b, arithmetic) <= _COPIED:
        out = _whole(a, b, initial, arithmetic, key)
        return out.double() if wide else out
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch, a.shape[-2], b.shape[-1])
    out = torch.empty(shape, dtype=result_dtype(arithmetic.accumulator), device=a.device)
    start = out.new_zeros(()) if initial is None else initial.detach()
    _by_parts(
        out,
        a.detach().expand(*batch, *a.shape[-2:]),
        b.detach().expand(*batch, *b.shape[-2:]),
        start.expand(shape),
        arithmetic,
    )
    return out.double() if wide else out


def _copied(a: Tensor, b: Tensor, arithmetic: Arithmetic) -> int:
    """How many numbers are copied to be rounded; 0 where the product cannot be cut into parts."""
    how = arithmetic.accumulator
    if how.rounding is Rounding.STOCHASTIC or arithmetic.sparse is not Sparse.NONE:
        return 0  # random bits belong to places in the whole result
    choice = choose("matmul", a.device, arithmetic.backend, asked=how, tensors=(a, b))
    return sum(
        0 if _is_on_grid(x, format) or _rounds_on_the_way(choice, x, format) else x.numel()
        for x, format in zip((a, b), arithmetic.operands, strict=True)
    )


def _rounds_on_the_way(choice: Choice, x: Tensor, format: Format) -> bool:
    """True where the kernel rounds the operand while it packs it, without a copy."""
    return (
        choice.function is native.matmul_into
        and x.dtype is torch.float32
        and not native.refuses_round(format, ())
        and holds(torch.float32, format)
    )


def _by_parts(out: Tensor, a: Tensor, b: Tensor, start: Tensor, arithmetic: Arithmetic) -> None:
    """``out = a @ b + start``, all of one batch, in parts that copy little."""
    small = max(_copied(a, b, arithmetic), out.numel()) <= _COPIED // 2
    if out.dim() > 2 and len(out) == 1:
        _by_parts(out[0], a[0], b[0], start[0], arithmetic)
    elif small or out.numel() == 1:
        out.copy_(_whole(a, b, start, arithmetic, NO_KEY))
    elif out.dim() > 2:
        for part in _halves(len(out)):
            _by_parts(out[part], a[part], b[part], start[part], arithmetic)
    elif out.shape[0] >= out.shape[1]:
        for part in _halves(out.shape[0]):
            _by_parts(out[part], a[part], b, start[part], arithmetic)
    else:
        for part in _halves(out.shape[1]):
            _by_parts(out[:, part], a, b[:, part].contiguous(), start[:, part], arithmetic)


def _halves(size: int) -> tuple[slice, slice]:
    return slice(0, size // 2), slice(size // 2, size)


def _whole(
    a: Tensor, b: Tensor, initial: Tensor | None, arithmetic: Arithmetic, key: Key
) -> Tensor:
    how, backend = arithmetic.accumulator, arithmetic.backend
    left, right = arithmetic.operands
    if arithmetic.sparse is Sparse.NONE:
        return _multiply(a, b, how, initial, key, backend, arithmetic.operands)
    function = _sparse_rows if arithmetic.sparse is Sparse.A else _sparse_columns
    return function(
        on_grid(a, left), on_grid(b, right), how, initial=initial, key=key, backend=backend
    )


def _is_on_grid(x: Tensor, format: Format) -> bool:
    """True where `on_grid` rounds nothing."""
    if x.dtype is torch.float32:
        return format.name == "fp32"
    return x.dtype is not torch.float64 and _holds_all(x.dtype, format)


def on_grid(x: Tensor, format: Format) -> Tensor:
    """``x`` rounded to the format, in float32, which holds it; no graph. Itself where it is on it."""
    x = x.detach()
    if _is_on_grid(x, format):
        return x.float()
    out = torch.empty_like(x, dtype=torch.float32)
    round_into(out, x, format)
    return out


_DTYPES = {torch.float16: Format.parse("fp16"), torch.bfloat16: Format.parse("bf16")}


def _holds_all(dtype: torch.dtype, format: Format) -> bool:
    """True if rounding to the format changes no number of the dtype."""
    return format == _DTYPES[dtype] or format.name == "fp32"


class _Product(Function):
    """One matrix product; its backward is two more, which can be differentiated in their turn."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, initial: Tensor | None, arithmetic: Arithmetic, key: Key
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.initial = None if initial is None else (initial.shape, initial.dtype)
        ctx.arithmetic, ctx.key = arithmetic, key
        return _product(a, b, initial, arithmetic, key)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        def again(x: Tensor, y: Tensor, how: Arithmetic, turn: int) -> Any:
            return _derived(x, y, None, how, next_key(ctx.key, turn))

        return (*_gradients(ctx, grads[0], ctx.arithmetic, again), None, None)


class _Transformed(_Product):
    """The same for `torch.func` and forward mode, which have another form; it takes longer to call."""

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, initial: Tensor | None, arithmetic: Arithmetic, key: Key
    ) -> Tensor:
        return _product(a, b, initial, arithmetic, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, initial, ctx.arithmetic, ctx.key = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.initial = None if initial is None else (initial.shape, initial.dtype)
        ctx.dtype = output.dtype

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        a, b = ctx.saved_tensors
        of_a, of_b, of_initial, *_ = tangents
        how, parts = ctx.arithmetic, [] if of_initial is None else [of_initial]
        if of_b is not None:
            parts.insert(0, _derived(a, of_b, None, how.of_b, next_key(ctx.key, 2)))
        if of_a is not None:
            parts.insert(0, _derived(of_a, b, None, how.of_a, next_key(ctx.key, 1)))
        return sum(part.to(ctx.dtype) for part in parts)  # pyright: ignore[reportReturnType]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        *tensors, arithmetic, key = arguments
        numbers = list(zip(tensors, in_dims, strict=False))
        if arithmetic.is_random or in_dims[0] is in_dims[1] is None:
            # random bits belong to places in the result; each example has those that it would have alone
            examples = [
                _derived(*[each(x, dim, i) for x, dim in numbers], arithmetic, key)
                for i in range(info.batch_size)
            ]
            return torch.stack(examples), 0
        most = max(x.dim() - (dim is not None) for x, dim in numbers if x is not None)
        return _derived(*[_leading(x, dim, most) for x, dim in numbers], arithmetic, key), 0


def each(x: Tensor | None, dim: int | None, i: int) -> Tensor | None:
    """Of a tensor that `torch.vmap` has batched along ``dim`` example i; another one as it is."""
    return x if x is None or dim is None else x.select(dim, i)


def _leading(x: Tensor | None, dim: int | None, dimensions: int) -> Tensor | None:
    """``x`` with its batch of examples first, before so many others."""
    if x is None or dim is None:
        return x
    x = x.movedim(dim, 0)
    return x[(slice(None), *[None] * (dimensions + 1 - x.dim()))]


def _gradients(
    ctx: Any,
    grad: Tensor,
    arithmetic: Arithmetic,
    again: Callable[[Tensor, Tensor, Arithmetic, int], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of a, b and initial; ``again`` is a product with random bits of the turn's own."""
    a, b, *_ = ctx.saved_tensors
    to_a = to_b = to_initial = None
    if ctx.needs_input_grad[0]:
        left, right = _folded(a.shape[:-2], grad, b.mT)
        to_a = again(left, right, arithmetic.of_a, 1).view(a.shape).to(a.dtype)
    if ctx.needs_input_grad[1]:
        # transposed, so that it is the right operand's batch that folds into rows and columns
        left, right = _folded(b.shape[:-2], grad.mT, a)
        to_b = again(right.mT, left.mT, arithmetic.of_b, 2).view(b.shape).to(b.dtype)
    if ctx.needs_input_grad[2]:
        shape, dtype = ctx.initial
        to_initial = grad.sum_to_size(shape).to(dtype)
    return to_a, to_b, to_initial


def _folded(kept: torch.Size, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x (batch, I, J) and y (batch, J, L) with the batch dimensions that ``kept`` lacks moved into J.

    One product of the two is then the sum over those dimensions, in order, last one fastest but J.
    """
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
    sizes = [1] * (len(batch) - len(kept)) + list(kept)
    summed = [d for d, (size, all) in enumerate(zip(sizes, batch, strict=True)) if size != all]
    if summed:
        rest = [d for d in range(len(batch)) if d not in summed]
        at = len(batch)
        x = x.permute(*rest, at, *summed, at + 1).flatten(len(rest) + 1)
        y = y.permute(*rest, *summed, at, at + 1).flatten(len(rest), -2)
    return x, y


@outside_graphs
def multiply(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    *,
    initial: Tensor | None = None,
    key: Key = NO_KEY,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """``a @ b + initial`` of operands that are rounded already, without a graph.

    The result is float32, or float64 where float32 does not hold the accumulator's numbers.

    ``a`` (..., M, K) and ``b`` (..., K, N), float32, leading dimensions broadcast; ``initial``
    broadcasts to the result, +0 if not given. Checks are the caller's; see `halfstep.matmul`.
    """
    return plain_multiply(a, b, accumulator, initial=initial, key=key, backend=backend)


def plain_multiply(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    *,
    initial: Tensor | None = None,
    key: Key = NO_KEY,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """`multiply` inside of a node."""
    return _multiply(a, b, accumulator, initial, key, backend, None)


def _multiply(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    initial: Tensor | None,
    key: Key,
    backend: Backend,
    operands: tuple[Format, Format] | None,
) -> Tensor:
    """`multiply` of operands that are to be rounded first; None where they are."""
    choice = choose("matmul", a.device, backend, asked=accumulator, tensors=(a, b))
    left = right = None
    if operands is not None:
        a, left = _prepared(choice, a, operands[0])
        b, right = _prepared(choice, b, operands[1])
    a, b = a.detach().resolve_neg(), b.detach().resolve_neg()
    shape = (a.shape[0], b.shape[1])
    if not a.dim() == b.dim() == 2:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
        shape = (*batch, a.shape[-2], b.shape[-1])
    out = a.new_empty(shape, dtype=result_dtype(accumulator))
    start = out.new_zeros(()) if initial is None else initial.detach()
    arguments = out, a, b, start.expand(shape), accumulator, key
    if left is right is None:
        choice.function(*arguments)
    else:
        native.matmul_into(*arguments, (left, right))
    return out


def _prepared(choice: Choice, x: Tensor, format: Format) -> tuple[Tensor, Format | None]:
    """The operand, rounded if the kernel does not, and what the kernel rounds it to."""
    if not _is_on_grid(x, format) and _rounds_on_the_way(choice, x, format):
        return x, format
    return on_grid(x, format), None


def _sparse_rows(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    *,
    initial: Tensor | None,
    key: Key,
    backend: Backend,
) -> Tensor:
    """`multiply` of what is stored of a 2:4 sparse ``a``: each row by the rows of ``b`` that it meets."""
    if accumulator.rounding is Rounding.STOCHASTIC:
        raise OperandError("matmul: sparse with stochastic rounding; leave one of them away")
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch, a.shape[-2], b.shape[-1])
    start = (a.new_zeros(()) if initial is None else initial.detach()).expand(shape)
    a, b, start = (
        x.detach().expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:])
        for x in (a, b, start)
    )
    stored, places = compressed(a)
    out = b.new_empty(start.shape, dtype=result_dtype(accumulator))
    count = max(1, _GATHERED // max(1, stored.shape[-1] * b.shape[-1]))
    for matrix in range(out.shape[0]):
        for first in range(0, out.shape[1], count):
            rows = slice(first, first + count)
            out[matrix, rows] = plain_multiply(
                stored[matrix, rows, None],
                b[matrix][places[matrix, rows]],
                accumulator,
                initial=start[matrix, rows, None],
                key=key,
                backend=backend,
            )[:, 0]
    return out.view(shape)


def _sparse_columns(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    *,
    initial: Tensor | None,
    key: Key,
    backend: Backend,
) -> Tensor:
    """`multiply` of what is stored of a 2:4 sparse ``b``; a product does not mind the order of the two."""
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    turned = accumulator.replace(operands=accumulator.operands[::-1])
    start = None if initial is None else initial.detach().expand(shape).mT
    return _sparse_rows(b.mT, a.mT, turned, initial=start, key=key, backend=backend).mT


# In a graph; halfstep.ops.custom says how.


def _eager(
    a: Tensor, b: Tensor, initial: Tensor | None, how: str, seed: Tensor | None, turns: list[int]
) -> Tensor:
    # a product of what is sparse may come as a view, turned
    return _product(a, b, initial, Arithmetic.of_text(how), key_of_node(seed, turns)).contiguous()


def _fake(
    a: Tensor, b: Tensor, initial: Tensor | None, how: str, seed: Tensor | None, turns: list[int]
) -> Tensor:
    arithmetic = Arithmetic.of_text(how)
    check_steps("matmul", arithmetic, a.shape[-1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    wide = torch.float64 in (a.dtype, b.dtype)
    dtype = torch.float64 if wide else result_dtype(arithmetic.accumulator)
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, initial, ctx.how, seed, ctx.turns = inputs
    ctx.save_for_backward(a, b, seed)
    ctx.initial = None if initial is None else (initial.shape, initial.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    def again(x: Tensor, y: Tensor, how: Arithmetic, turn: int) -> Tensor:
        return _node(x, y, None, how.text, ctx.saved_tensors[2], [*ctx.turns, turn])

    return (*_gradients(ctx, grad, Arithmetic.of_text(ctx.how), again), None, None, None)


_node = operator(
    "matmul",
    "(Tensor a, Tensor b, Tensor? initial, str how, Tensor? seed, int[] turns) -> Tensor",
    _eager,
    fake=_fake,
    backward=_backward,
    setup=_save,
)
