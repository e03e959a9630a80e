"""Dot products in every instruction set give the portable kernel's bits, on operands made to be hard.

The portable kernel adds in double, one sum after another (decision 13); test_matmul.py holds it to the
reference. Millions of sums: what goes wrong for one mantissa in ten thousand shows here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfstep import matmul
from halfstep.ops import native

if native.MISSING:
    pytest.skip(native.MISSING, allow_module_level=True)

FAST = [name for name in native.core().instruction_sets() if name != "portable"]
ACCUMULATORS = ("fp16", "bf16", "tf32", "e6m9", "e5m2", "e4m3fn", "e8m10", "e5m7", "e8m3", "e3m10")
ORDERS = ("", "/products-rounded", "/chunk64/between-fp32", "/chunk16")
OPERANDS = ("fp16", "bf16", "e4m3fn", "e5m2", "fp32", "tf32")
SHAPES = ((13, 300, 150), (40, 130, 33), (7, 700, 31), (2, 300, 64), (1, 700, 150), (40, 64, 1))


def _spread(shape: tuple[int, int], kind: int, generator: torch.Generator) -> Tensor:
    """Operands with many ties, many subnormal products, one sign, or many zeros."""
    normal = torch.randn(shape, generator=generator)
    power = torch.randint(-16, 8, (1,), generator=generator)
    if kind == 0:
        return torch.randint(-8, 9, shape, generator=generator).float()
    if kind == 1:
        return torch.ldexp(torch.randint(-3, 4, shape, generator=generator).float(), power)
    if kind == 2:
        return torch.ldexp(normal, torch.randint(-14, 4, shape, generator=generator))
    if kind == 3:
        return normal.relu()
    if kind == 4:
        return torch.ldexp(-normal.abs(), power)
    return normal


def _differences(seed: int, accumulate: str, name: str) -> list[str]:
    """The products of one accumulator whose bits differ from the portable kernel's."""
    generator = torch.Generator().manual_seed(seed)
    wrong = []
    for index, (rows, depth, columns) in enumerate(SHAPES):
        left, right = torch.randint(0, 6, (2,), generator=generator).tolist()
        operands = OPERANDS[(seed + index) % len(OPERANDS)]
        a = _spread((rows, depth), left, generator)
        b = _spread((depth, columns), right, generator)
        sums = []
        for each in ("portable", name):
            with native.instruction_set(each):
                sums.append(matmul(a, b, operands, accumulate))
        torch.nan_to_num_(sums[0])
        torch.nan_to_num_(sums[1])
        if not torch.equal(*(each.view(torch.int32) for each in sums)):
            wrong.append(f"{operands} {rows}x{depth}x{columns}, kinds {left} and {right}")
    return wrong


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_it_has_the_portable_bits(accumulator: str, order: str, name: str) -> None:
    assert _differences(0, accumulator + order, name) == []


@pytest.mark.parametrize("name", FAST)
def test_a_sum_that_underflows_keeps_its_sign_among_many_ties(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(1, 5, (24, 300), generator=generator).float()
    b = torch.randint(-8, 9, (300, 96), generator=generator).float()
    a[0, 0] = b[0, 0] = 1 + 2.0**-10  # products of many digits, which leave no easier way
    b[:, ::3] = -(2.0**-20)  # beside columns of ties: what many ties are added by is chosen for all
    with native.instruction_set(name):
        sums = matmul(a, b, "fp16", "e5m2")
    assert torch.equal(
        sums[:, ::3].contiguous().view(torch.int32), torch.full((24, 32), -0.0).view(torch.int32)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_it_has_the_portable_bits_in_the_long_run(accumulator: str, order: str, name: str) -> None:
    for seed in range(1, 25):
        assert _differences(seed, accumulator + order, name) == [], seed
