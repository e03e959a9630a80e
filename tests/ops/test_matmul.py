"""`matmul`: every back end against fractions and each other, its gradient and its errors."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import halfstep
import text_book
from adversarial import adversarial, same_numbers
from halfstep.errors import HalfstepError
from halfstep.format import Accumulator, Format, round_number
from halfstep.ops import native, products

NATIVE_SETS = [] if native.MISSING else native._core.instruction_sets()
BACKENDS = ["reference", *NATIVE_SETS]
SEED = 11


def on(
    backend: str, a: Tensor, b: Tensor, accumulate: str, initial: Tensor | None = None
) -> Tensor:
    if backend == "reference":
        return halfstep.matmul(a, b, "fp32", accumulate, initial=initial, backend="reference")
    with native.instruction_set(backend):
        return halfstep.matmul(a, b, "fp32", accumulate, initial=initial)


def dot_until_overflow(a: list[float], b: list[float], f: Format) -> float:
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
    right = [
        [dot_until_overflow(row, column, f) for column in b.t().tolist()] for row in a.tolist()
    ]
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
        found = on(NATIVE_SETS[-1], a, b, "fp16")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [0, 1, 2, 7, 37])
@pytest.mark.parametrize(
    "accumulate",
    [
        "fp16",
        "fp32",
        "bf16/toward_zero",
        "e6m9/away",
        "fp16/up",
        "fp16/products-rounded",
        "bf16/pairwise",
        "e5m2/pairwise/products-rounded/chunk10",
        "fp16/kahan",
        "bf16/kahan/products-rounded/down",
        "bf16/chunk8",
        "e6m9/chunk8/between-fp32",
        "bf16/split3",
        "e4m3/chunk4/split3/between-bf16",
        "q8.8",
        "int24",
    ],
)
def test_every_order_equals_fractions(backend: str, depth: int, accumulate: str):
    accumulator = Accumulator.parse(accumulate)
    scale = 20.0 if accumulate == "int24" else 1.0
    a, b = operands(3, depth, scale=scale), operands(depth, 4, scale=scale)
    start = operands(3, 4, scale=scale)
    right = [
        [
            text_book.dot(row, column, accumulator, start[i, j].item())
            for j, column in enumerate(b.t().tolist())
        ]
        for i, row in enumerate(a.tolist())
    ]
    assert torch.equal(on(backend, a, b, accumulate, start), torch.tensor(right))


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("backend", NATIVE_SETS)
@pytest.mark.parametrize("start", [1.0001, -2.7, 1e-7, 7e4, INF, NAN, -0.0, 3e-39, 12345.678])
@pytest.mark.parametrize(
    "accumulate", ["fp16", "bf16/split2", "e4m3fn", "fp32", "q8.8", "int24", "fp16/chunk2", "e8m22"]
)
def test_one_number_to_start_from(backend: str, start: float, accumulate: str):
    """It is rounded once, by another way than a tensor of them."""
    a, b = operands(3, 4), operands(4, 5)
    right = on("reference", a, b, accumulate, torch.tensor(start))
    assert same_numbers(on(backend, a, b, accumulate, torch.tensor(start)), right).all()
    tensor = torch.full((3, 5), start)
    assert same_numbers(on(backend, a, b, accumulate, tensor), right).all()


def test_stochastic_sums_are_unbiased_and_known_by_their_seed():
    """The mean of n sums of K = 50 steps, each of at most a unit u of the sum's binade, in 4 sigma."""
    rows = 4000
    a, b = operands(1, 50).abs().expand(rows, 50), operands(50, 1).abs()
    exact = (a[:1].double() @ b.double()).item()

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return halfstep.matmul(a, b, "fp32", "bf16", rounding="stochastic", generator=generator)

    sums = drawn(SEED)
    assert torch.equal(sums, drawn(SEED))
    assert not torch.equal(sums, drawn(SEED + 1))
    unit = 2.0 ** (math.frexp(exact)[1] + 1 - 8)  # a sum may have passed into the next binade
    # each rounding is uniform on at most one unit, variance u^2/4 at most; its bias 2^-17 u
    sigma = unit / 2 * math.sqrt(50 / rows)
    assert abs(sums.double().mean().item() - exact) < 4 * sigma + 50 * unit * 2.0**-17
    assert sums.std() > 0


@pytest.mark.parametrize(
    ("a_shape", "b_shape", "initial_shape"),
    [
        ((3, 4), (4, 2), (2,)),
        ((4,), (4, 2), (2,)),
        ((3, 4), (4,), ()),
        ((4,), (4,), ()),
        ((2, 3, 4), (4, 2), (3, 1)),
        ((3, 4), (5, 4, 2), (5, 3, 2)),
        ((2, 1, 3, 4), (3, 4, 2), (2, 3, 3, 2)),
        ((0, 4), (4, 2), (2,)),
    ],
)
def test_gradient_is_straight_through(a_shape, b_shape, initial_shape):
    """The product is linear in each operand: on small integers, differences over 1 are exact."""
    generator = torch.Generator().manual_seed(SEED)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).double().requires_grad_()

    inputs = integers(*a_shape), integers(*b_shape), integers(*initial_shape)

    def function(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
        return halfstep.matmul(a, b, "fp16", "fp16", initial=initial)

    with torch.no_grad():
        found, right = function(*inputs), torch.matmul(*inputs[:2]) + inputs[2]
    assert torch.equal(found, right)
    assert torch.autograd.gradcheck(function, inputs, eps=1.0, atol=0, rtol=0)
    grads = integers(*found.shape)
    assert torch.autograd.gradgradcheck(function, inputs, grads, eps=1.0, atol=0, rtol=0)


def test_the_backward_has_formats_of_its_own():
    a, b = operands(3, 8).requires_grad_(), operands(8, 4).requires_grad_()
    out = halfstep.matmul(a, b, "e4m3fn", "fp16", gradient="e5m2", grad_accumulate="bf16/chunk2")
    grad = operands(3, 4)
    out.backward(grad)
    low = halfstep.round_to(grad, "e5m2")
    x, y = (halfstep.round_to(t.detach(), "e4m3fn") for t in (a, b))
    assert torch.equal(out, halfstep.matmul(x, y, "fp32", "fp16"))
    assert torch.equal(a.grad, halfstep.matmul(low, y.t(), "fp32", "bf16/chunk2"))
    assert torch.equal(b.grad, halfstep.matmul(x.t(), low, "fp32", "bf16/chunk2"))


def test_operands_are_rounded_once_each_to_its_own():
    a, b = torch.tensor([[1 + 2**-4 + 2**-40]], dtype=torch.float64), torch.tensor([[1.1]])
    # 1 + 2^-4 is a tie of e4m3fn; what is beyond it decides, and a float32 would have lost it
    found = halfstep.matmul(a, b, ("e4m3fn", "bf16"), "fp32")
    assert found.dtype is torch.float64
    assert found.item() == 1.125 * 1.1015625


def test_sixteen_bit_operands_are_taken_as_they_are():
    a, b = operands(3, 8), operands(8, 4)
    assert torch.equal(halfstep.matmul(a.half(), b.half(), "fp32"), halfstep.matmul(a, b, "fp32"))


@pytest.mark.parametrize(
    "text", ["fp16", "bf16/products-rounded/pairwise", "e6m9/stochastic/chunk64/between-fp32"]
)
def test_an_accumulator_is_what_its_text_says(text: str):
    assert str(Accumulator.parse(text)) == text
    assert Accumulator.parse(Accumulator.parse(text)) == Accumulator.parse(text)


TWO = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("a", "b", "options", "text"),
    [
        (
            torch.ones(()),
            TWO,
            {},
            "matmul: a is torch.float32 of shape () (torch.strided); allowed",
        ),
        (TWO.int(), TWO, {}, "matmul: a is torch.int32 of shape (2, 2)"),
        (TWO, [1], {}, "matmul: b is a list; allowed: a torch.Tensor"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3),
            {},
            "matmul: a is (2, 3) on cpu and b is (2, 3) on cpu; wanted: (..., M, K) and",
        ),
        (
            torch.ones(2, 2, 2),
            torch.ones(3, 2, 2),
            {},
            "matmul: leading dimensions of a (2, 2, 2) and b (3, 2, 2) do not broadcast",
        ),
        (TWO, TWO, {"initial": torch.ones(3)}, "matmul: initial is (3,); it must broadcast to the"),
        (TWO, TWO, {"operands": ("fp16",)}, "matmul: operands=('fp16',); allowed: a format, or a"),
        (
            TWO,
            TWO,
            {"accumulate": "e8m0"},
            "accumulator: adder=e8m0, in which nothing can be added",
        ),
        (TWO, TWO, {"chunk": -1}, "accumulator: chunk=-1; allowed: a whole number from 0"),
        (TWO, TWO, {"split": 0}, "accumulator: split=0; allowed: a whole number from 1"),
        (TWO, TWO, {"order": "pairwize"}, "unknown order 'pairwize'; did you mean pairwise?"),
        (
            TWO,
            TWO,
            {"accumulate": "fp16/chnk64"},
            "unknown word of an accumulator 'chnk64'; did you",
        ),
        (
            TWO,
            TWO,
            {"accumulate": "fp16/kahan/pairwise"},
            "accumulator: Kahan's summation is sequential; leave one of them away",
        ),
    ],
)
def test_errors_say_what_is_allowed(a: Tensor, b: Tensor, options: dict, text: str):
    with pytest.raises(HalfstepError) as raised:
        halfstep.matmul(a, b, **options)
    assert str(raised.value).startswith(text)


def several(kind: str, *shape: int, seed: int) -> Tensor:
    """Operands that each way of adding natively is chosen for, or must not be."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if kind == "ties":  # sums of few digits, half of them between two numbers
        return torch.randint(-4000, 4000, shape, generator=generator).float()
    if kind == "few digits":
        return halfstep.round_to(x, "e4m3")
    if kind == "sixteen digits":
        return halfstep.round_to(x, "bf16")
    if kind == "wide range":
        return x * 2.0 ** torch.randint(-30, 10, shape, generator=generator)
    if kind == "one sign":
        return halfstep.round_to(x.abs() * 3, "fp16")
    if kind == "sparse":
        return halfstep.round_to(x * (torch.rand(*shape, generator=generator) < 0.3), "fp16")
    if kind == "not finite":
        x[torch.rand(*shape, generator=generator) < 0.002] = math.inf
    return x


KINDS = ["ties", "few digits", "sixteen digits", "wide range", "one sign", "sparse", "not finite"]


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "accumulate",
    [
        "fp16",
        "e5m2",
        "bf16",
        "e4m3fn",
        "e4m3:saturate",
        "e6m14",
        "fp32/up",
        "bf16/away",
        "e5m10/toward_zero/products-rounded",
        "e6m9/down/chunk16",
        "fp16/products-rounded",
        "bf16/stochastic",
        "e4m3/stochastic/chunk16/between-fp32",
        "fp16/chunk24/split3",
        "e5m2/pairwise/stochastic",
        "fp16/kahan/split2",
        "e8m22",
    ],
)
def test_native_sums_equal_the_reference(accumulate: str, kind: str):
    a, b = several(kind, 7, 90, seed=SEED), several(kind, 90, 37, seed=SEED + 1)
    start = halfstep.round_to(several(kind, 37, seed=SEED + 2), "fp16")
    check_native(a, b, accumulate, start)
    check_native(a[:1], b, accumulate, None)  # one row, few columns: tiles of other forms
    check_native(a, b.t().contiguous().t()[:, :3], accumulate, None)


def check_native(a: Tensor, b: Tensor, accumulate: str, start: Tensor | None) -> None:
    def on_backend(backend: str) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        options: Any = {"initial": start, "backend": backend, "generator": generator}
        return halfstep.matmul(a, b, "fp32", accumulate, **options)

    right = on_backend("reference")
    for name in NATIVE_SETS:
        with native.instruction_set(name):
            assert same_numbers(on_backend("native"), right).all(), name


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "accumulate",
    ["fp16", "bf16", "e4m3", "fp32", "fp16/chunk64/between-fp32", "e6m9/stochastic", "fp16/away"],
)
def test_large_products_equal_the_reference(accumulate: str, kind: str):
    """More than one block of rows, of columns and of depth."""
    a, b = several(kind, 130, 600, seed=SEED), several(kind, 600, 150, seed=SEED + 1)
    check_native(a, b, accumulate, None)
    check_native(a[:3].repeat(1, 5), b[:, :2].repeat(5, 1), accumulate, None)


def test_negative_zero_starts_and_stays():
    zero = torch.zeros(1, 1)
    start = torch.tensor(-0.0)
    for accumulate in ("fp16", "fp16/products-rounded", "bf16/toward_zero"):
        for backend in ("reference", "auto"):
            found = halfstep.matmul(zero, -zero, "fp32", accumulate, initial=start, backend=backend)
            assert found.signbit().item(), (accumulate, backend)


@pytest.mark.parametrize(
    "shapes",
    [
        ((70, 90), (90, 80)),
        ((3, 90), (90, 200)),
        ((5, 3, 20, 30), (3, 30, 9)),
        ((1, 400), (400, 1)),
    ],
    ids=str,
)
def test_large_operands_of_other_dtypes_are_rounded_in_parts(
    shapes: Any, monkeypatch: pytest.MonkeyPatch
):
    a = several("normal", *shapes[0], seed=SEED).double()
    b = several("normal", *shapes[1], seed=SEED + 1).double()
    start = several("normal", shapes[1][-1], seed=SEED + 2)
    whole = halfstep.matmul(a, b, "e4m3fn", "fp16/chunk24", initial=start)
    monkeypatch.setattr(products, "_COPIED", 500)
    in_parts = halfstep.matmul(a, b, "e4m3fn", "fp16/chunk24", initial=start)
    assert same_numbers(in_parts, whole).all()
    a.requires_grad_()
    halfstep.matmul(a, b, "e4m3fn", "fp16/chunk24").sum().backward()
    gradient = a.grad
    monkeypatch.undo()
    a.grad = None
    halfstep.matmul(a, b, "e4m3fn", "fp16/chunk24").sum().backward()
    assert same_numbers(gradient, a.grad).all()


@pytest.mark.parametrize(
    "accumulate",
    ["fp32", "fp16", "bf16/chunk64", "fp16/products-rounded", "fp16/kahan", "fp16/stochastic"],
)
@pytest.mark.parametrize(
    "shapes",
    [((1, 700), (700, 90)), ((1, 700), (700, 1)), ((90, 70), (70, 3)), ((4, 5, 70), (70, 33))],
    ids=str,
)
@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("kind", ["normal", "not finite"])
def test_operands_are_rounded_while_they_are_packed(
    accumulate: str, shapes: Any, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """As `halfstep.round_to` rounds them, transposed and broadcast, and not in their own memory."""
    a, b = several(kind, *shapes[0], seed=SEED), several(kind, *shapes[1], seed=SEED + 1)
    kept = a.clone(), b.clone()
    for formats in (("e4m3fn", "fp32"), ("fp32", "e5m2:saturate"), ("bf16", "int8")):
        left, right = (halfstep.round_to(x, f) for x, f in zip((a, b), formats, strict=True))
        seeds = [torch.Generator().manual_seed(SEED) for _ in range(2)]
        found = halfstep.matmul(a, b, formats, accumulate, generator=seeds[0])
        expected = halfstep.matmul(left, right, "fp32", accumulate, generator=seeds[1])
        assert same_numbers(found, expected).all(), formats
    assert same_numbers(a, kept[0]).all() and same_numbers(b, kept[1]).all()

    def no_copy(*_: Any) -> None:
        raise AssertionError("an operand was copied to be rounded")

    monkeypatch.setattr(products, "round_into", no_copy)
    halfstep.matmul(a.mT.contiguous().mT, b, "e4m3fn", accumulate)
