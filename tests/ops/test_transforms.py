"""Dot products and blocks inside of `torch.func`'s transforms: torch's answers where sums are exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import halfstep
from halfstep.errors import OperandError
from halfstep.ops import round_blocks

F = torch.func
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)
EXACT = {"operands": "fp16", "accumulate": "fp32"}


def whole(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).float()


TORCHS: dict[Callable[..., Tensor], tuple[Callable[..., Tensor], Tensor, Tensor]] = {
    halfstep.matmul: (torch.matmul, whole(3, 5), whole(5, 2)),
    halfstep.conv2d: (torch.nn.functional.conv2d, whole(2, 2, 4, 4), whole(3, 2, 2, 2)),
    halfstep.conv_transpose1d: (
        torch.nn.functional.conv_transpose1d,
        whole(2, 2, 4),
        whole(2, 3, 2),
    ),
}
OPS = pytest.mark.parametrize("op", TORCHS)


def both(
    op: Callable[..., Tensor],
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor, Tensor]:
    torchs, a, b = TORCHS[op]
    return partial(op, **EXACT), torchs, a, b


@OPS
def test_derivatives_of_every_kind_are_torchs(op: Callable[..., Tensor]):
    ours, torchs, a, b = both(op)
    for transform in (F.jacrev, F.jacfwd):
        for argnums in (0, 1):
            found = transform(ours, argnums)(a, b)
            assert torch.equal(found, transform(torchs, argnums)(a, b))
    assert torch.equal(F.jvp(ours, (a, b), (2 * a, b))[1], F.jvp(torchs, (a, b), (2 * a, b))[1])
    hessians = [F.hessian(lambda x, f=f: f(x, b).square().sum())(a) for f in (ours, torchs)]
    assert torch.equal(*hessians)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a, 3 * a)
        assert torch.equal(forward_ad.unpack_dual(ours(dual, b)).tangent, torchs(3 * a, b))


@OPS
@pytest.mark.parametrize("how", ["fp16", "e5m2/chunk3", "bf16/pairwise", "e5m2/stochastic"])
def test_a_batch_of_examples_is_the_examples(op: Callable[..., Tensor], how: str):
    _, a, b = TORCHS[op]
    many, more = torch.stack([a, a / 3, 2 * a], -1), torch.stack([b / 7, b, -b], 1)

    def f(x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(5)
        return op(x, y, operands="fp16", accumulate=how)

    for dims in [(-1, None), (None, 1), (-1, 1)]:
        given = [many if dims[0] is not None else a, more if dims[1] is not None else b]
        alone = [
            f(*[x if d is None else x.select(d, i) for x, d in zip(given, dims, strict=True)])
            for i in range(3)
        ]
        assert torch.equal(F.vmap(f, dims, randomness="same")(*given), torch.stack(alone))


@OPS
def test_gradients_of_each_example(op: Callable[..., Tensor]):
    ours, torchs, a, b = both(op)
    many, weight = torch.stack([a, 2 * a]), whole(*torchs(a, b).shape)
    found, right = (
        F.vmap(F.grad(lambda y, x, f=f: (f(x, y) * weight).sum()), (None, 0))(b, many)
        for f in (ours, torchs)
    )
    assert torch.equal(found, right)
    of_all = F.grad(lambda y: (F.vmap(lambda x: ours(x, y))(many) * weight).sum())(b)
    assert torch.equal(of_all, right.sum(0))


def test_batches_inside_of_batches_and_of_the_start_alone():
    a, b, start = whole(2, 3, 5), whole(4, 2, 5, 2), whole(6, 2)
    found = F.vmap(partial(halfstep.matmul, **EXACT), (None, 0))(a, b)
    assert torch.equal(found, torch.matmul(a, b))

    def f(c: Tensor) -> Tensor:
        return halfstep.matmul(a, b[0], initial=c, **EXACT)

    assert torch.equal(F.vmap(f)(start), torch.stack([torch.matmul(a, b[0]) + c for c in start]))


def test_tangents_are_rounded_like_gradients():
    a, b = torch.randn(3, 8), torch.randn(8, 2)
    how = {
        "operands": "e4m3fn",
        "accumulate": "fp16",
        "gradient": "e5m2",
        "grad_accumulate": "bf16",
    }
    tangent = F.jvp(lambda x: halfstep.matmul(x, b, **how), (a,), (a / 3,))[1]
    assert torch.equal(tangent, halfstep.matmul(a / 3, b, ("e5m2", "e4m3fn"), "bf16"))


def test_block_tensors():
    x = torch.randn(3, 40)

    def f(t: Tensor) -> Tensor:
        return halfstep.quantize_blocks(t, "mxfp4").dequantize()

    assert torch.equal(F.grad(lambda t: f(t).square().sum() / 2)(x), f(x))
    with pytest.raises(OperandError, match=r"inside of torch.vmap, where a BlockTensor cannot be"):
        F.vmap(f)(x)
    assert torch.equal(F.vmap(lambda t: round_blocks(t, "mxfp4"))(x), f(x))


def test_random_bits_of_their_own_for_each_example_are_refused():
    with pytest.raises(OperandError, match=r"inside of torch.vmap; allowed: randomness='same'"):
        F.vmap(lambda t: halfstep.round_to(t, "e2m1", "stochastic"), randomness="different")(
            torch.ones(2, 3)
        )
