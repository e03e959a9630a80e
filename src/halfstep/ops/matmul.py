"""`matmul`: the public edge of dot products. Checks and gradient; back ends do the arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from halfstep.errors import OperandError
from halfstep.format import Accumulator, Format, Order, Products, Rounding, Unit
from halfstep.ops.arithmetic import (
    INTEGERS,
    NO_KEY,
    Arithmetic,
    arithmetic_of,
    carried,
    check_operand,
    is_integer,
    key_for,
    next_key,
    rounded,
)
from halfstep.ops.backends import Backend, choose
from halfstep.ops.custom import outside_graphs
from halfstep.ops.integer_sums import result_dtype, takes_bytes
from halfstep.ops.random_bits import Key
from halfstep.ops.sparsity import Sparse, compressed, prune_2_4

__all__ = ["matmul", "multiply", "product"]

_GATHERED = 2**22  # numbers of the right operand that are gathered at once for a sparse left one


@outside_graphs
def matmul(
    a: Tensor,
    b: Tensor,
    operands: Format | str | tuple[Format | str, Format | str] = "fp16",
    accumulate: Accumulator | Format | Unit | str = "fp16",
    order: Order | str | None = None,
    chunk: int | None = None,
    initial: Tensor | None = None,
    *,
    between: Format | str | None = None,
    split: int | None = None,
    rounding: Rounding | str | None = None,
    products: Products | str | None = None,
    compensated: bool | None = None,
    gradient: Format | str | None = None,
    grad_accumulate: Accumulator | Format | Unit | str | None = None,
    generator: torch.Generator | None = None,
    backend: Backend | str = Backend.AUTO,
    sparse: Sparse | str | None = None,
) -> Tensor:
    """``a @ b + initial`` with operands in one format and the sum in another, bit for bit defined.

    ``a`` and ``b`` are as for `torch.matmul` (vectors, matrices, batches that broadcast, any
    strides), float32, float64 or 16-bit, on one device; integers too where the operands' format is
    ``intN``. The result is float32; float64 where an operand is, or where the accumulator is a
    fixed-point format of more than 25 bits; int32 where both operands and the accumulator are
    integers. ``initial`` (the C of A @ B + C) broadcasts to the result.

    Both operands are rounded to ``operands`` (nearest; a pair gives each its own; "fp32" leaves
    float32 and 16-bit tensors as they are) and multiplied exactly. ``accumulate`` says in which
    numbers they are added: a format, a matrix unit, or the text form of an `Accumulator`, of which the
    keywords ``order`` to ``compensated`` change single fields. For each element of the result, R being the
    rounding to the accumulator's format, once, and RB that to ``between`` (nearest; R where it is
    the same format, as it is unless given)::

        sum = R(initial or +0)                     # to nearest; RB where there are chunks or parts
        # order="sequential": one rounding a step, as a fused multiply-add in the format
        for k in range(K): sum = R(sum + a[k] * b[k])
        # products="rounded": the product is rounded, too
        for k in range(K): sum = R(sum + R(a[k] * b[k]))
        # order="pairwise": a tree over the products; an odd one out goes up a level as it is
        terms = [a[k] * b[k] for k in range(K)]
        while len(terms) > 1: terms = [R(x + y) for x, y in pairs_of(terms)] + odd_one_out(terms)
        sum = R(sum + terms[0])
        # compensated: Kahan's
        lost = +0
        for k in range(K):
            term = R(a[k] * b[k] - lost); new = R(sum + term)
            lost = R(R(new - sum) - term); sum = new
        # chunk=n: each n products are added as above from +0, and the chunks' sums in order
        for n products: sum = RB(sum + sum_of_these(n))
        # split=n: each of n parts of ceil(K / n) products is added as above from +0, with its chunks
        for part of n: sum = RB(sum + sum_of_part)

    ``accumulate`` may be a matrix unit (`halfstep.format.units`): ``v100``, ``a100``, ``h100`` ...; what
    is between chunks is done by it, as `halfstep.format.Unit` defines, and ``between`` is fp32 if
    not given: ``h100/chunk128`` promotes every 128 products to fp32.

    Rounding ``stochastic`` rounds the exact sum to float32 (nearest) and that to the format
    stochastically: unbiased to 2^(p - 25) of a unit in a format of p digits. Its random bits depend
    on the ``generator``, on k, and on the place in the result, on nothing else.

    - NaN, infinities, signs of zero and overflow are as IEEE 754 has them for each operation;
      formats without infinity saturate or become NaN as `round_to` says.
    - K = 0 gives R(initial or +0); an empty result is allowed.
    - fp32 accumulates with one FMA a step, in order: not what a BLAS does.

    Gradient: straight through, every rounding being passed over. The gradient that arrives is
    rounded to ``gradient`` (the format of ``a`` if not given) and multiplied with the rounded
    operands, added as ``grad_accumulate`` says (as the forward if not given); where an operand was
    broadcast, its gradient is one dot product over the batch, too.

    ``sparse``, "a" or "b", prunes that operand after its rounding to two of every four consecutive
    numbers along K (`halfstep.ops.prune_2_4`), and leaves the others' products out: chunks, blocks of a
    unit and the steps of a sum count what is stored, as on a sparse matrix unit, and an infinity or NaN
    that would meet a number left out is left out with it. The gradient of a pruned number is zero.
    ``backend`` is for tests: auto | reference | native | triton; see `halfstep.ops.explain`.

    Raises `UnknownNameError` for an unknown name, `FormatError` for an accumulator that cannot be,
    `OperandError` for tensors that cannot be multiplied.

    >>> ones = torch.ones(1, 4096)
    >>> matmul(ones, ones.T).item()   # 2048 + 1 is 2048 in fp16
    2048.0
    >>> matmul(ones, ones.T, chunk=64).item(), matmul(ones, ones.T, "fp16", "fp32").item()
    (4096.0, 4096.0)

    Source: IEEE 754-2019, section 5.4.1 (fusedMultiplyAdd); N. J. Higham, The accuracy of
    floating point summation, SIAM J. Sci. Comput. 14(4), 1993; chunks: Wang et al., arXiv
    1812.08011, section 2.3; ``between``: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """
    arithmetic = arithmetic_of(
        "matmul",
        operands=operands,
        accumulate=accumulate,
        order=order,
        chunk=chunk,
        between=between,
        split=split,
        rounding=rounding,
        products=products,
        compensated=compensated,
        gradient=gradient,
        grad_accumulate=grad_accumulate,
        backend=backend,
    )
    arithmetic = replace(arithmetic, sparse=Sparse.parse(sparse))
    left, right = arithmetic.operands
    counts = _are_integers(a, b, arithmetic)
    if (
        counts
        and initial is None
        and arithmetic.is_plain
        and takes_bytes(a, b, arithmetic.accumulator)
    ):
        return torch.ops.aten._int_mm(a, b)
    a, b = carried(a, left), carried(b, right)
    for name, operand in (("a", a), ("b", b)):
        check_operand("matmul", name, operand, least=1)
    a_rounded, b_rounded = rounded(a, left), rounded(b, right)
    rows = a_rounded if a.dim() > 1 else a_rounded.unsqueeze(0)
    columns = b_rounded if b.dim() > 1 else b_rounded.unsqueeze(1)
    shape = _shape_of(rows, columns, a, b)
    if arithmetic.sparse is Sparse.A:
        rows = prune_2_4(rows, -1)
    elif arithmetic.sparse is Sparse.B:
        columns = prune_2_4(columns, -2)
    if initial is None:
        start = torch.zeros((), dtype=torch.float32, device=a.device)
    else:
        initial = carried(initial, left)
        check_operand("matmul", "initial", initial, least=0)
        start = _inserted(initial, a.dim() == 1, b.dim() == 1)
        _check_broadcasts(start, shape, initial)
    out = product(rows, columns, start, arithmetic, generator)
    if counts:
        out = out.to(torch.int32)
    if a.dim() == 1:
        out = out.squeeze(-2)
    return out.squeeze(-1) if b.dim() == 1 else out


def product(
    a: Tensor,
    b: Tensor,
    initial: Tensor,
    arithmetic: Arithmetic,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``a @ b + initial`` of operands that are rounded already; checks are the caller's.

    ``a`` (..., M, K) and ``b`` (..., K, N) broadcast, ``initial`` broadcasts to the result.
    """
    key = key_for("matmul", arithmetic, a.shape[-1], generator)
    return _Product.apply(a, b, initial, arithmetic, key)  # pyright: ignore[reportReturnType]


class _Product(Function):
    """One matrix product; its backward is two more, which can be differentiated in their turn."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, initial: Tensor, arithmetic: Arithmetic, key: Key
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.initial_shape, ctx.initial_dtype = initial.shape, initial.dtype
        ctx.arithmetic, ctx.key = arithmetic, key
        # rounded operands have at most 24 digits, and the exponents of a float32
        function = {Sparse.NONE: multiply, Sparse.A: _sparse_rows, Sparse.B: _sparse_columns}
        out = function[arithmetic.sparse](
            a.to(torch.float32),
            b.to(torch.float32),
            arithmetic.accumulator,
            initial=initial,
            key=key,
            backend=arithmetic.backend,
        )
        return out.double() if torch.float64 in (a.dtype, b.dtype) else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b = ctx.saved_tensors
        (grad,) = grads
        arithmetic = ctx.arithmetic
        low = rounded(grad, arithmetic.gradient)
        none = torch.zeros((), dtype=torch.float32, device=grad.device)
        need_a, need_b, need_initial, *_ = ctx.needs_input_grad
        to_a = to_b = to_initial = None
        if need_a:
            left, right = _folded(a.shape[:-2], low, b.mT)
            key = next_key(ctx.key, 1)
            to_a = _Product.apply(left, right, none, arithmetic.of_a, key).view(a.shape).to(a.dtype)
        if need_b:
            # transposed, so that it is the right operand's batch that folds into rows and columns
            left, right = _folded(b.shape[:-2], low.mT, a)
            key = next_key(ctx.key, 2)
            product = _Product.apply(right.mT, left.mT, none, arithmetic.of_b, key)
            to_b = product.view(b.shape).to(b.dtype)
        if need_initial:
            to_initial = grad.sum_to_size(ctx.initial_shape).to(ctx.initial_dtype)
        return to_a, to_b, to_initial, None, None


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
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = a.detach().resolve_neg().expand(*batch, *a.shape[-2:])
    b = b.detach().resolve_neg().expand(*batch, *b.shape[-2:])
    shape = (*batch, a.shape[-2], b.shape[-1])
    out = a.new_empty(shape, dtype=result_dtype(accumulator))
    start = out.new_zeros(()) if initial is None else initial.detach()
    choice = choose("matmul", a.device, backend, asked=accumulator, tensors=(a, b))
    choice.function(out, a, b, start.expand(out.shape), accumulator, key)
    return out


def _sparse_rows(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    *,
    initial: Tensor,
    key: Key,
    backend: Backend,
) -> Tensor:
    """`multiply` of what is stored of a 2:4 sparse ``a``: each row by the rows of ``b`` that it meets."""
    if accumulator.rounding is Rounding.STOCHASTIC:
        raise OperandError("matmul: sparse with stochastic rounding; leave one of them away")
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch, a.shape[-2], b.shape[-1])
    a, b, start = (
        x.detach().expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:])
        for x in (a, b, initial.expand(shape))
    )
    stored, places = compressed(a)
    out = b.new_empty(start.shape, dtype=result_dtype(accumulator))
    count = max(1, _GATHERED // max(1, stored.shape[-1] * b.shape[-1]))
    for matrix in range(out.shape[0]):
        for first in range(0, out.shape[1], count):
            rows = slice(first, first + count)
            out[matrix, rows] = multiply(
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
    initial: Tensor,
    key: Key,
    backend: Backend,
) -> Tensor:
    """`multiply` of what is stored of a 2:4 sparse ``b``; a product does not mind the order of the two."""
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    turned = accumulator.replace(operands=accumulator.operands[::-1])
    start = initial.expand(shape).mT
    return _sparse_rows(b.mT, a.mT, turned, initial=start, key=key, backend=backend).mT


def _are_integers(a: object, b: object, arithmetic: Arithmetic) -> bool:
    """True if the result is made of integers as the operands are."""
    adder = arithmetic.forward.adder
    integers = all(isinstance(x, Tensor) and x.dtype in INTEGERS for x in (a, b))
    return integers and not isinstance(adder, Unit) and is_integer(adder)


def _shape_of(rows: Tensor, columns: Tensor, a: Tensor, b: Tensor) -> torch.Size:
    if rows.shape[-1] != columns.shape[-2] or a.device != b.device:
        raise OperandError(
            f"matmul: a is {tuple(a.shape)} on {a.device} and b is {tuple(b.shape)} on {b.device}; "
            "wanted: (..., M, K) and (..., K, N) on one device"
        )
    try:
        batch = torch.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])
    except RuntimeError:
        raise OperandError(
            f"matmul: leading dimensions of a {tuple(a.shape)} and b {tuple(b.shape)} "
            "do not broadcast"
        ) from None
    return torch.Size((*batch, rows.shape[-2], columns.shape[-1]))


def _inserted(initial: Tensor, row: bool, column: bool) -> Tensor:
    """``initial`` with the dimensions that vectors lack in the result."""
    if column and initial.dim():
        initial = initial.unsqueeze(-1)
    if row and initial.dim() > int(column):
        initial = initial.unsqueeze(-2)
    return initial


def _check_broadcasts(start: Tensor, shape: torch.Size, initial: Tensor) -> None:
    try:
        fits = torch.broadcast_shapes(start.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise OperandError(
            f"matmul: initial is {tuple(initial.shape)}; it must broadcast to the result, {tuple(shape)}"
        )
