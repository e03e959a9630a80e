"""`matmul`: the public edge of dot products. It checks; `halfstep.ops.products` has the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfstep.errors import OperandError
from halfstep.format import Accumulator, Format, Order, Products, Rounding, Unit
from halfstep.ops.arithmetic import (
    Arithmetic,
    arithmetic_of,
    arithmetic_text,
    carried,
    check_operand,
    operands_of,
    rounded,
)
from halfstep.ops.backends import Backend
from halfstep.ops.carriers import INTEGERS
from halfstep.ops.custom import is_traced
from halfstep.ops.integer_sums import takes_bytes
from halfstep.ops.products import product
from halfstep.ops.sparsity import Sparse, prune_2_4

if TYPE_CHECKING:
    from halfstep.ops.arithmetic import Keywords

__all__ = ["matmul"]


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
    strides), float32, float64 or 16-bit, on one device; integers (int8 to int64, uint8, bool) too where
    the operands' format is ``intN``. The result is float32; float64 where an operand is, or where the
    accumulator is a fixed-point format of more than 25 bits; int32 where both operands and the
    accumulator are integers. ``initial`` (the C of A @ B + C) broadcasts to the result.

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
    broadcast, its gradient is one dot product over the batch, too. In forward mode tangents are rounded
    and added like gradients. The transforms of `torch.func` work; under ``vmap`` every example is as alone.

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

    Source: IEEE 754-2019 (fusedMultiplyAdd); N. J. Higham, The accuracy of floating point
    summation, SIAM J. Sci. Comput. 14(4), 1993 (neither checked); chunks: Wang et al., arXiv
    1812.08011; ``between``: DeepSeek-V3, arXiv 2412.19437.
    """
    keywords: Keywords = {
        "operands": operands,
        "accumulate": accumulate,
        "order": order,
        "chunk": chunk,
        "between": between,
        "split": split,
        "rounding": rounding,
        "products": products,
        "compensated": compensated,
        "gradient": gradient,
        "grad_accumulate": grad_accumulate,
        "backend": backend,
    }
    if is_traced():
        return _product(a, b, initial, arithmetic_text("matmul", sparse, keywords), generator)
    arithmetic = arithmetic_of("matmul", sparse=sparse, **keywords)
    if _adds_bytes(a, b, initial, arithmetic):
        return torch.ops.aten._int_mm(a, b)
    return _product(a, b, initial, arithmetic, generator)


def _product(
    a: Tensor,
    b: Tensor,
    initial: Tensor | None,
    how: Arithmetic | str,
    generator: torch.Generator | None,
) -> Tensor:
    """``how``: as text in a graph."""
    if isinstance(how, str):
        left, right, sparse, *integers = operands_of(how).splitlines()
        integers = "".join(integers)
    else:
        (left, right), sparse, integers = how.operands, how.sparse.value, how.integers
    counts = "+" in integers and _is_integer(a) and _is_integer(b)
    a, b = carried(a, "a" in integers), carried(b, "b" in integers)
    for name, operand in (("a", a), ("b", b)):
        check_operand("matmul", name, operand, least=1)
    rows = a if a.dim() > 1 else a.unsqueeze(0)
    columns = b if b.dim() > 1 else b.unsqueeze(1)
    shape = _shape_of(rows, columns, a, b)
    if sparse == Sparse.A.value:
        rows = prune_2_4(rounded(rows, left), -1)
    elif sparse == Sparse.B.value:
        columns = prune_2_4(rounded(columns, right), -2)
    start = None
    if initial is not None:
        initial = carried(initial, "a" in integers)
        check_operand("matmul", "initial", initial, least=0)
        start = _inserted(initial, a.dim() == 1, b.dim() == 1)
        _check_broadcasts(start, shape, initial)
    out = product(rows, columns, start, how, generator)
    if counts:
        out = out.to(torch.int32)
    if a.dim() == 1:
        out = out.squeeze(-2)
    return out.squeeze(-1) if b.dim() == 1 else out


def _is_integer(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in INTEGERS


def _adds_bytes(a: Any, b: Any, initial: object, arithmetic: Arithmetic) -> bool:
    """True if a library's product of bytes is the whole of it."""
    return (
        _is_integer(a)
        and _is_integer(b)
        and "+" in arithmetic.integers
        and initial is None
        and arithmetic.is_plain
        and takes_bytes(a, b, arithmetic.accumulator)
    )


def _shape_of(rows: Tensor, columns: Tensor, a: Tensor, b: Tensor) -> torch.Size:
    if rows.shape[-1] != columns.shape[-2] or a.device != b.device:
        raise OperandError(
            f"matmul: a is {tuple(a.shape)} on {a.device} and b is {tuple(b.shape)} on {b.device}; "
            "wanted: (..., M, K) and (..., K, N) on one device"
        )
    if rows.dim() == columns.dim() == 2:
        return torch.Size((rows.shape[0], columns.shape[1]))
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
