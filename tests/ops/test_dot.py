"""`dot_accumulate`: both back ends against fractions and each other."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import halfstep
from adversarial import adversarial, same_numbers
from halfstep.errors import OperandError
from halfstep.format import Format, round_number
from halfstep.ops import dot_accumulate, native

NATIVE_SETS = [] if native.MISSING else native._core.instruction_sets()
BACKENDS = ["reference", *NATIVE_SETS]
SEED = 11


def on(backend: str, a: Tensor, b: Tensor, format: str) -> Tensor:
    if backend == "reference":
        return dot_accumulate(a, b, format, backend="reference")
    with native.instruction_set(backend):
        return dot_accumulate(a, b, format)


def text_book(a: list[float], b: list[float], f: Format) -> float:
    total: Fraction | float = Fraction(0)
    for x, y in zip(a, b, strict=True):
        total = round_number(Fraction(total) + Fraction(x) * Fraction(y), f)
        if isinstance(total, float) and not math.isfinite(total):
            return total  # finite operands cannot bring it back, but may make it NaN: not here
    return float(total)


def operands(*shape: int, format: str = "fp16", scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + sum(shape))
    return halfstep.round_to(torch.randn(*shape, generator=generator) * scale, format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["fp16", "bf16", "e5m2", "e6m9", "e8m1", "e4m3", "tf32"])
@pytest.mark.parametrize("scale", [1.0, 2e-4, 3.0])
def test_equals_fractions(backend: str, format: str, scale: float):
    """Scales that reach the subnormal numbers, and those that overflow the small formats."""
    a, b = operands(5, 40, scale=scale), operands(40, 3, scale=scale)
    f = Format.parse(format)
    right = [[text_book(row, column, f) for column in b.t().tolist()] for row in a.tolist()]
    assert same_numbers(on(backend, a, b, format), torch.tensor(right)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_fused_not_rounded_twice(backend: str):
    """2048 + (1 + 2^-19): a float32 sum in between loses the 2^-19, and then there is a tie."""
    a = torch.tensor([[2048.0, 1 + 2**-9]])
    b = torch.tensor([[1.0], [1 - 2**-9 + 2**-17]])
    exact = Fraction(2048) + Fraction(a[0, 1].item()) * Fraction(b[1, 0].item())
    assert 2049 < exact < 2049 + 2**-12
    assert on(backend, a, b, "fp16").item() == 2050.0
    assert (a @ b).half().item() == 2048.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_swamping_is_there(backend: str):
    ones = torch.ones(1, 2100)
    assert on(backend, ones, ones.t(), "fp16").item() == 2048
    assert on(backend, ones, ones.t(), "bf16").item() == 256


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("a", "b", "right"),
    [
        ([INF, 1.0], [1.0, 1.0], INF),
        ([INF, 1.0], [0.0, 1.0], NAN),
        ([INF, INF], [1.0, -1.0], NAN),
        ([NAN, 1.0], [1.0, 1.0], NAN),
        ([1.0, 1.0], [1.0, -1.0], 0.0),
        ([-0.0, -0.0], [1.0, 1.0], 0.0),  # +0 + -0
        ([300.0, -300.0], [300.0, 300.0], INF),  # once infinite, finite terms do not mend it
        ([-(2.0**-20)], [2.0**-20], -0.0),
        ([65504.0, 16.0], [1.0, 1.0], INF),
        ([65504.0, 15.984375], [1.0, 1.0], 65504.0),
    ],
)
def test_special_values(backend: str, a: list[float], b: list[float], right: float):
    found = on(backend, torch.tensor([a]), torch.tensor(b)[:, None], "fp16")
    assert same_numbers(found, torch.tensor([[right]])).all()


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("format", ["fp16", "bf16", "e6m9", "e5m2"])
@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((1, 1), (1, 1)),
        ((7, 33), (33, 65)),
        ((3, 1, 9, 20), (4, 20, 31)),
        ((2, 70, 5), (5, 40)),
        ((1, 1100), (1100, 1)),
        ((4, 0), (0, 5)),
        ((0, 4), (4, 5)),
        ((2, 3, 4), (2, 4, 0)),
    ],
)
def test_shapes(format: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]):
    a, b = operands(*a_shape), operands(*b_shape)
    right = on("reference", a, b, format)
    assert right.shape == torch.matmul(a, b).shape
    for backend in NATIVE_SETS:
        assert same_numbers(on(backend, a, b, format), right).all(), backend
        transposed = on(backend, a.mT.contiguous().mT, b.mT.contiguous().mT, format)
        assert same_numbers(transposed, right).all(), backend


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("format", ["fp16", "e6m9", "bf16"])
def test_adversarial_operands(format: str):
    """Any float32 operands: overflow, subnormal numbers, infinities, NaN."""
    x = adversarial(Format.parse(format), torch.float32)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))[:1200]]
    a, b = x[:600].view(100, 6), x[600:].view(6, 100)
    right = on("reference", a, b, format)
    for backend in NATIVE_SETS:
        assert same_numbers(on(backend, a, b, format), right).all(), backend


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(threads: int):
    a, b = operands(2, 130, 60), operands(2, 60, 190)
    right = on("reference", a, b, "fp16")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = dot_accumulate(a, b, "fp16")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, right)


def test_sixteen_bit_operands_are_taken_as_they_are():
    a, b = operands(3, 8), operands(8, 4)
    assert torch.equal(dot_accumulate(a.half(), b.half(), "fp16"), dot_accumulate(a, b, "fp16"))


@pytest.mark.parametrize(
    ("a", "b", "format", "text"),
    [
        (
            torch.ones(2),
            torch.ones(2, 2),
            "fp16",
            "dot_accumulate: a is torch.float32 of shape (2,); allowed: float32, float16 or bfl",
        ),
        (
            torch.ones(2, 3),
            torch.ones(2, 3),
            "fp16",
            "dot_accumulate: a is (2, 3) on cpu and b is (2, 3) on cpu; wanted: (..., M, K) and",
        ),
        (
            torch.ones(2, 2, 2),
            torch.ones(3, 2, 2),
            "fp16",
            "dot_accumulate: leading dimensions of a (2, 2, 2) and b (3, 2, 2) do not broadcast",
        ),
        (
            torch.ones(2, 2),
            torch.ones(2, 2),
            "fp32",
            "dot_accumulate: accumulate=fp32; allowed: eXmY with Y up to 21, and the named",
        ),
        (torch.ones(2, 2), torch.ones(2, 2), "int8", "dot_accumulate: accumulate=int8; allowed: "),
    ],
)
def test_errors_say_what_is_allowed(a: Tensor, b: Tensor, format: str, text: str):
    with pytest.raises(OperandError) as raised:
        dot_accumulate(a, b, format)
    assert str(raised.value).startswith(text)
