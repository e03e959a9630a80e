"""Integer and fixed-point accumulators: library products against the step by step definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import halfstep
from adversarial import same_numbers
from halfstep.errors import OperandError
from halfstep.format import Accumulator, Format
from halfstep.ops import Backend, choose, integer_sums, native

SEED = 8
NATIVE_SETS = [] if native.MISSING else native.core().instruction_sets()
BACKENDS = ["reference", *NATIVE_SETS]
INT8 = Format.parse("int8")


def integers(*shape: int, low: int = -128, high: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + sum(shape))
    return torch.randint(low, high, shape, generator=generator)


def stepwise(
    backend: str,
    a: Tensor,
    b: Tensor,
    operands: str,
    accumulate: str,
    initial: Tensor | None = None,
) -> Tensor:
    if backend == "reference":
        return halfstep.matmul(a, b, operands, accumulate, initial=initial, backend="reference")
    with native.instruction_set(backend):
        return halfstep.matmul(a, b, operands, accumulate, initial=initial, backend="native")


def chosen(operands: str, accumulate: str, steps: int) -> Backend:
    format = Format.parse(operands)
    accumulator = Accumulator.parse(accumulate).of(format, format)
    x = torch.zeros(2, steps)
    return choose("matmul", x.device, Backend.AUTO, asked=accumulator, tensors=(x, x.t())).backend


def test_bytes_have_the_same_sums_by_every_product(monkeypatch: pytest.MonkeyPatch):
    """Where torch has no fast product of bytes it has a slow one: the ways to it are the same."""
    a, b = integers(5, 70).to(torch.int8), integers(70, 6).to(torch.int8)
    right = a.long() @ b.long()
    for fast in (False, True):
        monkeypatch.setattr(integer_sums, "_has_fast_bytes", lambda fast=fast: fast)
        assert integer_sums.takes_bytes(a, b, Accumulator.parse("int32").of(INT8, INT8)) is fast
        assert torch.equal(halfstep.matmul(a, b, "int8", "int32"), right.int())
        assert torch.equal(halfstep.matmul(a.float(), b.float(), "int8", "int32"), right.double())
    assert not integer_sums.takes_bytes(a, b, Accumulator.parse("int16").of(INT8, INT8))


@pytest.mark.parametrize("steps", [0, 1, 37, 1024, 1025, 3000])
def test_bytes_added_in_32_bits_are_exact(steps: int):
    a, b = integers(3, steps), integers(steps, 4)
    found = halfstep.matmul(a.float(), b.float(), "int8", "int32")
    assert found.dtype is torch.float64
    assert torch.equal(found, (a @ b).double())
    assert chosen("int8", "int32", steps) is Backend.NATIVE


def test_the_largest_sums():
    """All -128: 2^14 a product; 2^24 + 2^14 is beyond what float32 adds one by one."""
    a = torch.full((2, 1025), -128, dtype=torch.int8)
    found = halfstep.matmul(a, a.t(), "int8", "int32")
    assert found.dtype is torch.int32
    assert (found == 1025 * 2**14).all()
    assert (
        found.tolist() == halfstep.matmul(a, a.t(), "int8", "int32", backend="reference").tolist()
    )


@pytest.mark.parametrize(
    ("operands", "accumulate", "scale"),
    [
        ("int8", "int24", 40.0),
        ("int4", "int16/pairwise", 3.0),
        ("int8", "int32/chunk16/split3", 40.0),
        ("q4.4", "q16.8", 3.0),
        ("q4.4", "q16.9/up", 3.0),
        ("int12", "int32", 800.0),
        ("ternary", "int8", 1.0),
    ],
)
def test_equals_step_by_step(operands: str, accumulate: str, scale: float):
    generator = torch.Generator().manual_seed(SEED)
    a = torch.randn(2, 3, 50, generator=generator) * scale
    b = torch.randn(50, 4, generator=generator) * scale
    start = torch.randn(3, 1, generator=generator) * scale
    assert chosen(operands, accumulate, 50) is Backend.NATIVE
    found = halfstep.matmul(a, b, operands, accumulate, initial=start)
    right = halfstep.matmul(a, b, operands, accumulate, initial=start, backend="reference")
    assert found.dtype is right.dtype
    assert torch.equal(found, right)
    assert not (found.signbit() & (found == 0)).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_sums_saturate_at_every_step(backend: str):
    a = torch.tensor([100, 100, -100], dtype=torch.int8)
    b = torch.tensor([127, 127, 127], dtype=torch.int8)
    # 12700 and 25400 stop at 2^13 - 1; then 12700 less
    assert stepwise(backend, a, b, "int8", "int14").item() == 8191 - 12700
    assert stepwise(backend, a, b, "int8", "int16").item() == 12700


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize(
    ("operands", "accumulate", "scale"),
    [
        ("int8", "int15", 60.0),
        ("int8", "int18/chunk10", 60.0),
        ("int8", "int18/up", 60.0),
        ("q4.4", "q6.9", 3.0),
        ("int16", "int32", 20000.0),
        ("int12", "int24/chunk7", 800.0),
    ],
)
@pytest.mark.parametrize("shape", [(1, 90, 1), (35, 600, 3), (3, 45, 70)])
def test_saturating_sums_natively(operands: str, accumulate: str, scale: float, shape: tuple):
    m, k, n = shape
    generator = torch.Generator().manual_seed(SEED)
    # not of zero mean: sums reach an end, and some come back
    a = (torch.randn(2, m, k, generator=generator) + 0.3) * scale
    b = (torch.randn(k, n, generator=generator) + 0.3) * scale
    a[0, 0, k // 2] = torch.nan
    start = torch.randn(m, n, generator=generator) * scale
    right = stepwise("reference", a, b, operands, accumulate, start)
    exact = halfstep.round_to(a, operands).double() @ halfstep.round_to(b, operands).double()
    assert m == 1 or ((exact + halfstep.round_to(start, "q16.9")) != right).any()  # some saturated
    for backend in NATIVE_SETS:
        found = stepwise(backend, a, b, operands, accumulate, start)
        assert found.dtype is right.dtype
        assert same_numbers(found, right).all(), backend
        turned = stepwise(
            backend, a.mT.contiguous().mT, b.mT.contiguous().mT, operands, accumulate, start
        )
        assert same_numbers(turned, right).all(), backend


def test_an_initial_value_near_the_end_saturates():
    one = torch.ones(1, 1, dtype=torch.int8)
    top = torch.tensor([[2**31 - 1]], dtype=torch.int32)
    assert halfstep.matmul(one, one, "int8", "int32", initial=top).item() == 2**31 - 1
    assert halfstep.matmul(one, one, "int8", "int32", initial=top - 1).item() == 2**31 - 1
    assert halfstep.matmul(one, -one, "int8", "int32", initial=top).item() == 2**31 - 2


def test_nan_is_not_counted_away():
    a = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    found = halfstep.matmul(a, a.t(), "int8", "int32")
    assert found.isnan().tolist() == [[True, True], [True, False]]
    assert found[1, 1] == 5


def test_a_lowered_matmul_precision_changes_nothing():
    a, b = integers(4, 200).float(), integers(200, 4).float()
    right = halfstep.matmul(a, b, "int8", "int32")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(halfstep.matmul(a, b, "int8", "int32"), right)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("operands", "accumulate", "dtype"),
    [
        ("int8", "int24", torch.float32),
        ("int8", "int25", torch.float32),
        ("int8", "int26", torch.float64),
    ],
)
def test_the_result_holds_every_sum(operands: str, accumulate: str, dtype: torch.dtype):
    assert halfstep.matmul(torch.ones(1, 1), torch.ones(1, 1), operands, accumulate).dtype is dtype


def test_errors():
    with pytest.raises(OperandError, match=r"operands=int32, whose numbers float32 does not hold"):
        halfstep.matmul(torch.ones(1, 1), torch.ones(1, 1), "int32", "int32")
    with pytest.raises(OperandError, match=r"matmul: a is torch.int8 of shape \(1, 1\)"):
        halfstep.matmul(torch.ones(1, 1).char(), torch.ones(1, 1), "fp16", "int32")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("operands", ["int8", "int8:wrap"])
def test_integers_of_any_width_are_operands(dtype: torch.dtype, operands: str):
    large = [2**62 + 5, -(2**62) - 77, 2**52 + 200, 300, -300, 3, 0, -(2**63)]
    a = torch.tensor(large if dtype is torch.int64 else [3, 0, 1, 200 % 256, 1, 0, 0, 1]).to(dtype)
    rounded = halfstep.round_to(a, operands)
    found = halfstep.matmul(a, a, operands, "int32")
    assert found.dtype is torch.int32
    assert found.item() == (rounded * rounded).sum().item()


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_convolutions_of_integers(name: str):
    x, w, bias = integers(2, 4, 6, 6), integers(4, 4, 3, 3), integers(4)
    right = getattr(torch.nn.functional, name)(x.double(), w.double(), bias.double()).int()
    convolution = getattr(halfstep, name)
    how = {"operands": "int8", "accumulate": "int32"}
    for dtype in (torch.int8, torch.int64):
        found = convolution(x.to(dtype), w.to(dtype), bias.to(dtype), **how)
        assert found.dtype is torch.int32
        assert torch.equal(found, right)
    mixed = convolution(x.to(torch.int8), w.float(), bias.float(), **how)
    assert mixed.dtype.is_floating_point
    assert torch.equal(mixed.int(), right)
    with pytest.raises(
        OperandError, match=r"input is torch.int8 .*or integers where its format is intN"
    ):
        convolution(x.to(torch.int8), w.float(), operands="fp16")
