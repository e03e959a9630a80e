"""2:4 sparsity: what stays, its gradient, and products that count what is stored."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import halfstep
from halfstep.errors import HalfstepError
from halfstep.ops import prune_2_4

SEED = 24


def random(*shape: int, format: str = "fp16") -> Tensor:
    generator = torch.Generator().manual_seed(SEED + sum(shape))
    return halfstep.round_to(torch.randn(*shape, generator=generator), format)


def pruned(four: tuple[float, ...]) -> list[float]:
    """By the definition: the first two of the largest."""
    places = sorted(range(4), key=lambda i: (-abs(four[i]), i))[:2]
    return [x if i in places else 0.0 for i, x in enumerate(four)]


def test_every_order_of_four():
    for four in itertools.product((0.0, 1.0, -1.0, 2.0), repeat=4):
        assert prune_2_4(torch.tensor(four)).tolist() == pruned(four), four


def test_dimensions():
    x = random(8, 3, 12)
    by_rows = torch.tensor([pruned(tuple(four)) for four in x.reshape(-1, 4).tolist()])
    assert torch.equal(prune_2_4(x), by_rows.view_as(x))
    assert torch.equal(prune_2_4(x, 0), prune_2_4(x.movedim(0, -1)).movedim(-1, 0))
    assert torch.equal(prune_2_4(prune_2_4(x)), prune_2_4(x))
    assert prune_2_4(x.bfloat16()).dtype is torch.bfloat16
    assert prune_2_4(x[:, :0]).shape == (8, 0, 12)


def test_nan_stays():
    kept = prune_2_4(torch.tensor([math.inf, 5.0, math.nan, 6.0]))
    assert kept.isnan().tolist() == [False, False, True, False]
    assert kept[0] == math.inf


def test_the_gradient_is_that_of_what_stays():
    x = random(2, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(prune_2_4, (x,), eps=1e-6)


def by_definition(a: Tensor, b: Tensor, operands: str, accumulate: str) -> Tensor:
    """Row by row, the stored numbers in order, dense."""
    rows = []
    for row in prune_2_4(halfstep.round_to(a, operands)):
        places = [
            4 * group + i
            for group, four in enumerate(row.view(-1, 4).tolist())
            for i in sorted(sorted(range(4), key=lambda i: (-abs(four[i]), i))[:2])
        ]
        rows.append(halfstep.matmul(row[places][None], b[places], operands, accumulate))
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("operands", "accumulate"),
    [
        ("fp16", "a100"),
        ("e4m3fn", "h100"),
        ("fp16", "fp16"),
        ("bf16", "bf16/chunk8"),
        ("int8", "int32"),
    ],
)
def test_sums_are_over_what_is_stored(operands: str, accumulate: str):
    scale = 30.0 if operands == "int8" else 1.0
    a, b = random(5, 48) * scale, halfstep.round_to(random(48, 7) * scale, operands)
    found = halfstep.matmul(a, b, operands, accumulate, sparse="a")
    assert torch.equal(found, by_definition(a, b, operands, accumulate))
    turned = halfstep.matmul(b.t(), a.t(), operands, accumulate, sparse="b")
    assert torch.equal(turned, found.t())


def test_a_block_counts_stored_products():
    """8 stored products of an A100 are 16 places: 2^-14 is kept beside 2^10 but not by fp32, two are."""
    a = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] * 4)
    b, start = torch.full((32,), 2.0**-14), torch.tensor(1024.0)
    sparse = halfstep.matmul(a, b, "fp16", "a100", initial=start, sparse="a")
    dense = halfstep.matmul(a, b, "fp16", "a100", initial=start)
    assert (sparse.item(), dense.item()) == (1024 + 2 * 2.0**-13, 1024.0)


def test_what_is_left_out_takes_its_partner_along():
    a, b = torch.tensor([3.0, 2.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, math.inf, math.nan])
    assert halfstep.matmul(a, b, "fp16", "v100").isnan()
    assert halfstep.matmul(a, b, "fp16", "v100", sparse="a").item() == 5.0


def test_batches_and_the_backward():
    a = random(2, 1, 3, 16).requires_grad_()
    b = random(4, 16, 5).requires_grad_()
    start = random(3, 5)
    found = halfstep.matmul(a, b, "fp16", "a100", initial=start, sparse="a")
    assert found.shape == (2, 4, 3, 5)
    one = halfstep.matmul(a[1, 0], b[2], "fp16", "a100", initial=start, sparse="a")
    assert torch.equal(found[1, 2], one)
    grad = random(2, 4, 3, 5)
    found.backward(grad)
    kept = prune_2_4(a.detach()).requires_grad_()
    other = b.detach().clone().requires_grad_()
    halfstep.matmul(kept, other, "fp16", "a100").backward(grad)  # linear: the same gradients, dense
    assert torch.equal(b.grad, other.grad)
    assert torch.equal(a.grad, torch.where(prune_2_4(a.detach()) != 0, kept.grad, 0.0))


@pytest.mark.parametrize(
    ("shape", "options", "text"),
    [
        (
            (2, 6),
            {"sparse": "a"},
            "2:4 sparsity: dimension -1 of shape (2, 6); wanted: a dimension",
        ),
        ((2, 4), {"sparse": "c"}, "unknown sparse 'c'; known: a, b, none"),
        (
            (2, 4),
            {"sparse": "a", "rounding": "stochastic"},
            "matmul: sparse with stochastic rounding",
        ),
    ],
)
def test_errors(shape: tuple[int, int], options: dict, text: str):
    with pytest.raises(HalfstepError) as raised:
        halfstep.matmul(torch.ones(shape), torch.ones(shape).t(), **options)
    assert str(raised.value).startswith(text)
