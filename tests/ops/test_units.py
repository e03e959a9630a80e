"""Matrix units: every back end against fractions, recorded and published results, and each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import halfstep
import text_book
from adversarial import bits
from halfstep.errors import FormatError, HalfstepError
from halfstep.format import Accumulator, Format, Unit, units
from halfstep.ops import native

NATIVE_SETS = [] if native.MISSING else native._core.instruction_sets()
BACKENDS = ["reference", *NATIVE_SETS]
WAYS = [
    (name, each) for name, unit in units().items() for p in unit.datapaths for each in p.operands
]
SEED = 14


def on(
    backend: str,
    a: Tensor,
    b: Tensor,
    operands: str,
    unit: Unit | str,
    initial: Tensor | None = None,
) -> Tensor:
    if backend == "reference":
        return halfstep.matmul(a, b, operands, unit, initial=initial, backend="reference")
    with native.instruction_set(backend):
        return halfstep.matmul(a, b, operands, unit, initial=initial, backend="native")


def random(*shape: int, format: str, spread: int, seed: int = SEED) -> Tensor:
    """Numbers of the format whose exponents spread over 2 * spread binades."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    powers = torch.randint(-spread, spread + 1, shape, generator=generator)
    return halfstep.round_to(torch.randn(*shape, generator=generator) * torch.exp2(powers), format)


def spreads(format: str) -> list[int]:
    return [0, 6, 12, 60] if Format.parse(format).exponent_bits == 8 else [0, 6, 12]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("unit", "format"), WAYS)
def test_equals_fractions(backend: str, unit: str, format: str):
    """Two tiles of an instruction and a bit, with C; exponents near each other and far apart."""
    of = Accumulator.parse(unit).of(Format.parse(format), Format.parse(format))
    for spread in spreads(format):
        a = random(3, 37, format=format, spread=spread)
        b = random(37, 2, format=format, spread=spread)
        c = random(3, 2, format="fp32", spread=spread)
        right = [
            [
                text_book.unit_dot(row, column, of, c[i, j].item())
                for j, column in enumerate(b.t().tolist())
            ]
            for i, row in enumerate(a.tolist())
        ]
        found = on(backend, a, b, format, unit, c)
        assert torch.equal(bits(found), bits(torch.tensor(right))), spread


@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_on_an_h100(backend: str):
    """One of the 16-element products that the lowest exponent decides, and what an H100 made of it.

    Source: github.com/north-numerical-computing/MATLAB-tensor-core, issue 7, example 1.
    """

    def of_bits(text: str) -> Tensor:
        return (
            torch.tensor([int(word + "0000", 16) for word in text.split()])
            .int()
            .view(torch.float32)
        )

    a = of_bits("9b94 19f3 9a2e 1a67 9a25 9b4e 9b29 9a33 99e0 1a14 9914 99d1 9ae9 1b1a 9a9c 1b3a")
    b = of_bits("9aaf 99f3 9acc 1b7c 19ed 1b25 9a1b 9a20 9af7 9a48 1ae1 1b32 1b12 1b0e 9a68 1735")
    assert on(backend, a, b, "bf16", "h100").item() == float.fromhex("0x1.6p-146")
    path = replace(units()["h100"].datapaths[0], lowest_exponent=-132)
    other = replace(units()["h100"], datapaths=(path,))
    assert on(backend, a, b, "bf16", other).item() == float.fromhex("0x1.4p-146")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("unit", "lost"),
    [("v100", 2.0**-24), ("a100", 2.0**-25), ("h100", 2.0**-26), ("b200", 2.0**-26)],
)
def test_bits_that_a_unit_keeps(backend: str, unit: str, lost: float):
    """Fasi et al. 2021, section 4: 1 + x + x - 1 tells how far below the largest term a unit sees."""
    for x, right in ((lost, 0.0), (2 * lost, 4 * lost)):
        a = torch.tensor([1.0, x * 2.0**14, x * 2.0**14, -1.0])
        b = torch.tensor([1.0, 2.0**-14, 2.0**-14, 1.0])
        assert on(backend, a, b, "fp16", unit).item() == right


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_not_normalised(backend: str):
    """1.5 * 1.5 has exponent 0, as 1.5 has: what is 23 digits below both stays on a V100."""
    a, b = torch.tensor([1.5, 2.0**-10]), torch.tensor([1.5, 2.0**-13])
    c = torch.tensor(-2.25)
    assert on(backend, a, b, "fp16", "v100", c).item() == 0.0  # c = 2.25 has exponent 1
    assert on(backend, a, b, "fp16", "v100", torch.tensor(-1.75)).item() == 0.5 + 2.0**-23


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_h100_adds_fp8_in_14_digits(backend: str):
    """DeepSeek-V3's observation (arXiv 2412.19437, section 3.5.2), and its remedy: promotion."""
    ones, c = torch.ones(1, 256), torch.tensor(2.0**14)
    # each 1 is lost beside 2^14
    assert on(backend, ones, ones.t(), "e4m3fn", "h100", c).item() == 2.0**14
    assert on(backend, ones, ones.t(), "e4m3fn", "h100/chunk128", c).item() == 2.0**14 + 256


INF, NAN = math.inf, math.nan
TOP = torch.finfo(torch.float32).max


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("a", "b", "c", "right"),
    [
        ([INF, 1.0], [1.0, 1.0], 0.0, INF),
        ([INF, 1.0], [-1.0, 1.0], 0.0, -INF),
        ([INF, 1.0], [0.0, 1.0], 0.0, NAN),
        ([INF, INF], [1.0, -1.0], 0.0, NAN),
        ([INF], [-1.0], INF, NAN),
        ([INF], [1.0], INF, INF),
        ([1.0], [1.0], -INF, -INF),
        ([NAN, 1.0], [1.0, 1.0], 0.0, NAN),
        ([1.0], [1.0], NAN, NAN),
        ([0.0], [1.0], -INF, -INF),
        ([1.0, 1.0], [1.0, -1.0], 0.0, 0.0),
        ([-0.0, -0.0], [1.0, 1.0], -0.0, 0.0),
        ([2.0**127], [2.0], 0.0, INF),
        ([-(2.0**127)], [2.0], 0.0, -INF),
        ([2.0**104], [1.0], TOP, INF),
        ([2.0**103], [1.0], TOP, TOP),  # beyond the largest, and truncated
        ([2.0**127, 2.0**127], [2.0**127, -(2.0**127)], 3.0, 0.0),  # 3 is out of sight of 2^254
        ([2.0**127, 2.0**127, 1.0], [4.0, -4.0, 1.0], 0.0, 0.0),
        ([-(2.0**-70)], [2.0**-79], 0.0, -(2.0**-149)),
        ([-(2.0**-70)], [2.0**-80], 0.0, -0.0),
        ([2.0**-120], [2.0**-120], 0.0, 0.0),
        ([2.0**-133], [2.0**10], 0.0, 2.0**-123),  # a subnormal bf16
        ([0.0], [1.0], 2.0**-149, 2.0**-149),
        ([], [], -0.0, -0.0),
    ],
)
@pytest.mark.parametrize("unit", ["a100", "h100"])
def test_special_values(backend: str, unit: str, a: list, b: list, c: float, right: float):
    found = on(backend, torch.tensor(a), torch.tensor(b), "bf16", unit, torch.tensor(c))
    wanted = 0x7FFFFFFF if math.isnan(right) and a else bits(torch.tensor(right)).item()
    assert bits(found).item() == wanted, found


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_instruction_of_two_blocks_is_a_chain(backend: str):
    """m16n8k16 on an A100 is k = 0..7, then k = 8..15 onto that (arXiv 2511.10909, split-K)."""
    a, b = random(16, 16, format="fp16", spread=3), random(16, 8, format="fp16", spread=3)
    c = random(16, 8, format="fp32", spread=3)
    first = on(backend, a[:, :8], b[:8], "fp16", "a100", c)
    chained = on(backend, a[:, 8:], b[8:], "fp16", "a100", first)
    assert torch.equal(on(backend, a, b, "fp16", "a100", c), chained)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("unit", "seen"), [("v100/fp16", 2048), ("volta/fp16", 2048), ("v100", 2049)]
)
def test_a_result_in_fp16_is_rounded_after_each_block(backend: str, unit: str, seen: float):
    """2048 + 1 is a tie, which goes to even; 2048 + 3 is one too, and goes up. An overflow is infinite."""
    a, one = torch.tensor([[1.0, 0, 0, 0]]), torch.ones(4, 1)
    assert on(backend, a, one, "fp16", unit, torch.tensor(2048.0)).item() == seen
    three = on(backend, 3 * a, one, "fp16", "v100/fp16", torch.tensor(2048.0))
    assert three.item() == 2052
    edge = [
        on(backend, x * a, one, "fp16", "v100/fp16", torch.tensor(65504.0)).item() for x in (15, 16)
    ]
    assert edge == [65504, math.inf]
    tiny = on(backend, -(2.0**-13) * a, 2.0**-13 * one, "fp16", "v100/fp16")
    assert tiny.item() == 0 and tiny.signbit().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_in_fp16(backend: str):
    a = torch.tensor([[math.nan], [math.inf], [-math.inf]])
    found = on(backend, a, torch.ones(1, 1), "fp16", "a100/fp16")
    assert bits(found[0]).item() == 0x7FFFE000
    assert found[1:].flatten().tolist() == [math.inf, -math.inf]
    # what fp16 cannot hold is infinite before anything is added
    start = on(backend, torch.zeros(1, 1), torch.ones(1, 1), "fp16", "a100/fp16", torch.tensor(1e6))
    assert start.item() == math.inf


@pytest.mark.parametrize(
    "text",
    [
        "v100",
        "v100/fp16",
        "h100/fp16/chunk128",
        "h100/chunk128",
        "a100/chunk32/split2/between-bf16",
    ],
)
def test_an_accumulator_with_a_unit_is_what_its_text_says(text: str):
    accumulator = Accumulator.parse(text)
    assert str(accumulator) == text
    assert Accumulator.parse(str(accumulator)) == accumulator
    assert Accumulator.parse("hopper/chunk128/between-fp32") == Accumulator.parse("h100/chunk128")


def test_chunks_are_promoted():
    a, b = random(5, 300, format="e4m3fn", spread=2), random(300, 6, format="e4m3fn", spread=2)
    c = random(5, 6, format="fp32", spread=2)
    right = c
    for k in (0, 128, 256):
        right = right + halfstep.matmul(a[:, k : k + 128], b[k : k + 128], "e4m3fn", "h100")
    assert torch.equal(halfstep.matmul(a, b, "e4m3fn", "h100/chunk128", initial=c), right)


def test_the_operands_may_have_different_formats():
    """Subnormal numbers of e4m3fn begin at 2^-6, those of e5m2 at 2^-14: alignment tells them apart."""
    a, b = torch.tensor([1.0, 2.0**-9]), torch.tensor([1.0, 2.0**-3 + 2.0**-5])
    left, right = Format.parse("e4m3fn"), Format.parse("e5m2")
    of = Accumulator.parse("h100").of(left, right)
    found = halfstep.matmul(a, b, ("e4m3fn", "e5m2"), "h100").item()
    assert found == text_book.unit_dot(a.tolist(), b.tolist(), of)


def test_the_backward_goes_through_the_unit_too():
    a = random(4, 24, format="fp16", spread=3).requires_grad_()
    b = random(24, 6, format="fp16", spread=3).requires_grad_()
    grad = random(4, 6, format="fp16", spread=3)
    halfstep.matmul(a, b, "fp16", "v100", grad_accumulate="a100").backward(grad)
    assert torch.equal(a.grad, halfstep.matmul(grad, b.detach().t(), "fp16", "a100"))
    assert torch.equal(b.grad, halfstep.matmul(a.detach().t(), grad, "fp16", "a100"))


def test_every_unit_says_how_it_is_known():
    for unit in units().values():
        assert unit.source
        assert all(path.evidence for path in unit.datapaths), unit
        assert Unit.parse(unit.name.upper()) is unit
    assert not units()["b200"].datapaths[-1].verified


TWO = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"operands": "bf16", "accumulate": "v100"},
            "unit v100 (Volta): operands bf16 times bf16, which it does not multiply; it has: fp16; ",
        ),
        (
            {"operands": "e4m3fn", "accumulate": "a100"},
            "unit a100 (Ampere): operands e4m3fn times e4m3fn, which it does not multiply; it has: ",
        ),
        (
            {"operands": ("fp16", "bf16"), "accumulate": "v100"},
            "unit v100 (Volta): operands fp16 times bf16, which it",
        ),
        (
            {"operands": "fp16", "accumulate": "h100", "gradient": "e5m2"},
            "unit h100 (Hopper): operands e5m2 times fp16, which it",
        ),
        (
            {"operands": "bf16", "accumulate": "a100/fp16"},
            "unit a100/fp16 (Ampere): operands bf16 times",
        ),
        ({"accumulate": "h100/fp61"}, "unknown word of an accumulator 'fp61'"),
        ({"accumulate": "h10"}, "unknown format or unit 'h10'; did you mean h100"),
        ({"accumulate": "fp61"}, "unknown format or unit 'fp61'; did you mean fp16"),
        (
            {"accumulate": "v100", "order": "pairwise"},
            "accumulator: order with the unit v100, which has its own; allowed: chunk, between, split",
        ),
        ({"accumulate": "v100/kahan"}, "accumulator: compensated with the unit v100"),
        ({"accumulate": "v100/up"}, "accumulator: rounding with the unit v100"),
        ({"accumulate": "v100", "products": "rounded"}, "accumulator: products with the unit v100"),
    ],
)
def test_errors_say_what_a_unit_has(options: dict, text: str):
    with pytest.raises(HalfstepError) as raised:
        halfstep.matmul(TWO, TWO, **options)
    assert str(raised.value).startswith(text)


def test_a_unit_is_no_number_format():
    with pytest.raises(FormatError, match="v100 is a unit; wanted: a number format"):
        Accumulator.parse("v100").format  # noqa: B018
