"""Block formats: the reference against the twin in fractions, the back ends against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import block_twin
import halfstep
from adversarial import bits, same_numbers, sixteen_bit_patterns, specials
from block_cases import EVERY, NAMED, RULES, SEED, numbers
from halfstep.format import BlockFormat, Rounding
from halfstep.ops import (
    BlockTensor,
    draw_key,
    native,
    random_bits,
    round_blocks,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NATIVE_SETS = [] if native.MISSING else native._core.instruction_sets()
BACKENDS = ["reference", *NATIVE_SETS]


def on(backend: str, call, *arguments, seed: int = 7, **options):
    """The result on the reference, or on the native kernels of one instruction set."""
    if call is not BlockTensor.dequantize:
        options["generator"] = torch.Generator().manual_seed(seed)
    if backend == "reference":
        return call(*arguments, backend="reference", **options)
    with native.instruction_set(backend):
        return call(*arguments, **options)


# The reference against the text-book


@pytest.mark.parametrize("name", EVERY)
def test_reference_equals_the_twin_in_fractions(name: str):
    for dtype, shape, dim in [
        (torch.float32, (5, 70), -1),
        (torch.float64, (70, 5), 0),
        (torch.bfloat16, (2, 37, 3), 1),
        (torch.float16, (75,), 0),
    ]:
        x = numbers(shape, dtype)
        right, scales = block_twin.rounded(x, name, dim)
        found = round_blocks(x, name, dim, backend="reference")
        assert same_numbers(found, right.to(dtype)).all(), (dtype, shape)
        stored = halfstep.quantize_blocks(x, name, dim, backend="reference")
        assert same_numbers(stored.dequantize(right.dtype), right).all(), (dtype, shape)
        spread = torch.unique(scales[~scales.isnan()])
        assert set(stored.scales.float().flatten().tolist()) == set(spread.tolist())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e5m2", "nvfp4", "int8@row", "mxint8"])
@pytest.mark.parametrize("rounding", [r.value for r in Rounding])
def test_roundings_equal_the_twin(name: str, rounding: str):
    x = numbers((6, 50), torch.float32)
    key = draw_key(torch.Generator().manual_seed(7))
    draws = random_bits(key, x.shape, x.device)
    right, _ = block_twin.rounded(x, name, -1, Rounding(rounding), draws)
    found = on("reference", round_blocks, x, name, -1, rounding)
    assert same_numbers(found, right).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("element", ["e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "q2.6", "int8"])
def test_rules_where_they_switch(rule: str, element: str):
    """amax at powers of two, at the largest element times one, at EVEN's tie, and one ulp around."""
    f = BlockFormat.parse(f"{element}@1x2:{rule}")
    points = [1.0, f.element.max, f.element.max * 2.0**-40, 2 - 2.0 ** -(f.digits + 1), 1.5, 6e-39]
    points += [2.0**-140, 2.0**-127, 2.0**-126, 2.0**119, 2.0**127, 3.0e38]
    amax = torch.tensor(points, dtype=torch.float32)
    up, down = torch.tensor(torch.inf), torch.tensor(0.0)
    amax = torch.cat([amax, amax.nextafter(up), amax.nextafter(down)])
    x = torch.stack([amax, -amax / 3], -1)
    right, scales = block_twin.rounded(x, str(f), -1)
    for backend in BACKENDS:
        stored = on(backend, halfstep.quantize_blocks, x, f)
        assert torch.equal(stored.scales.float(), scales[:, :1]), backend
        assert same_numbers(on(backend, round_blocks, x, f), right).all(), backend


def test_what_the_rules_promise():
    """Nothing saturates under CEIL and RCEIL; RCEIL's scale is the smallest such, FLOOR's is below it."""
    x = numbers((64, 32), torch.float32)
    x = x[x.abs().amax(1) > 0]
    amax = x.abs().amax(1, keepdim=True)
    for element in ("mxfp4", "mxfp8_e4m3", "mxfp6_e2m3"):
        scale = {
            rule: halfstep.quantize_blocks(x, f"{element}:{rule}").scales.float() for rule in RULES
        }
        largest = BlockFormat.parse(element).element.max
        assert (scale["rceil"] * largest >= amax).all()
        assert (scale["rceil"] / 2 * largest < amax).all()
        assert (scale["ceil"] >= scale["rceil"]).all()
        assert (scale["floor"] <= scale["even"]).all()
        assert (scale["even"] <= scale["ceil"]).all()


# Native against the reference, bit for bit


def same_storage(a: BlockTensor, b: BlockTensor) -> bool:
    def raw(t: Tensor) -> Tensor:
        return t.contiguous().view(torch.uint8) if t.numel() else t.float()

    pairs = [
        (a.values, b.values),
        (a.scales, b.scales),
        (a.tensor_scale[None], b.tensor_scale[None]),
    ]
    return all(s.dtype is t.dtype and torch.equal(raw(s), raw(t)) for s, t in pairs)


def assert_back_ends_agree(x: Tensor, name: str, dim: int, rounding: str = "nearest") -> None:
    right = on("reference", round_blocks, x, name, dim, rounding)
    stored = on("reference", halfstep.quantize_blocks, x, name, dim, rounding)
    assert torch.equal(bits(on("reference", BlockTensor.dequantize, stored)), bits(right))
    for backend in NATIVE_SETS:
        where = (name, backend, rounding, x.dtype, tuple(x.shape), dim)
        found = on(backend, round_blocks, x, name, dim, rounding)
        assert torch.equal(bits(found), bits(right)), where
        quantized = on(backend, halfstep.quantize_blocks, x, name, dim, rounding)
        assert same_storage(quantized, stored), where
        assert torch.equal(bits(on(backend, BlockTensor.dequantize, stored)), bits(right)), where


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_back_ends_agree_on_hard_numbers(name: str, dtype: torch.dtype):
    """Any bits, infinities and NaN among them; and numbers over many binades."""
    width = {torch.float64: 64, torch.float32: 32}.get(dtype, 16)
    generator = torch.Generator().manual_seed(SEED)
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    integers = {64: torch.int64, 32: torch.int32, 16: torch.int16}[width]
    any_bits = torch.randint(low, high, (10, 96), generator=generator).to(integers).view(dtype)
    tame = torch.where(any_bits.isfinite(), any_bits, 1)
    x = torch.cat([any_bits, tame, numbers((20, 96), dtype)])
    every = name in ("mxfp8_e4m3", "mxfp4", "nvfp4", "mxint8") and dtype is not torch.float16
    for rounding in [r.value for r in Rounding] if every else ["nearest", "stochastic"]:
        assert_back_ends_agree(x, name, -1, rounding)


SHAPES = [(1,), (7,), (33,), (3, 70), (70, 3), (2, 35, 5), (2, 64, 16), (0,), (3, 0), (2, 0, 5)]
SHAPED = """
mxfp8_e4m3 mxfp6_e3m2 mxfp4 mxint8 nvfp4 e4m3fn@tensor e5m2@row e4m3fn@4x8:rceil int5@1x8
"""


@pytest.mark.parametrize("name", SHAPED.split())
def test_every_axis_and_ragged_ends(name: str):
    for index, shape in enumerate(SHAPES):
        rounding = "stochastic" if index % 2 else "nearest"
        for dim in range(-len(shape), len(shape)):
            assert_back_ends_agree(numbers(shape, torch.float32), name, dim, rounding)


@pytest.mark.parametrize("name", ["int8@32x32", "nvfp4@16x16", "e3m2@2x16", "e4m3fn@4x8:rceil"])
def test_tiles_over_axes_that_are_not_the_last_two(name: str):
    """As a convolution's weight has them; what is not finite, and an ``out`` that lies otherwise."""
    x = numbers((5, 34, 3, 7), torch.float32)
    x[1, 3, 2, 1], x[4, 33, 0, 6] = math.inf, math.nan
    for dim in range(4):
        for rounding in ("nearest", "stochastic"):
            assert_back_ends_agree(x, name, dim, rounding)
        out = torch.empty(7, 3, 34, 5).permute(3, 2, 1, 0)
        round_blocks(x, name, dim, out=out)
        assert same_numbers(out, round_blocks(x, name, dim, backend="reference")).all()


def test_tiles_larger_than_a_cache_line():
    x = numbers((260, 300), torch.float32)
    assert_back_ends_agree(x, "e4m3fn@128x128", 0)
    assert_back_ends_agree(x, "int8@32x48", 1)
    assert_back_ends_agree(x, "mxfp4", 0)


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
def test_every_sixteen_bit_number():
    for dtype in (torch.float16, torch.bfloat16):
        x = sixteen_bit_patterns(dtype)
        assert_back_ends_agree(x.view(-1, 64), "nvfp4", -1)
        assert_back_ends_agree(x.view(-1, 64).t().contiguous(), "mxfp4", 0)


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "nvfp4", "e4m3fn@128x128"])
def test_sizes_threads_and_streaming(name: str):
    before = torch.get_num_threads()
    for shape in [(1, 2**20 + 32), (1030, 1031)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        right = on("reference", round_blocks, x, name)
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for offset in (0, 3):
                    store = torch.full((x.numel() + 16,), 9.0)
                    out = store[offset : offset + x.numel()].view(shape)
                    assert torch.equal(on(NATIVE_SETS[0], round_blocks, x, name, out=out), right)
                    assert (store[:offset] == 9).all()
                    assert (store[offset + x.numel() :] == 9).all()
        finally:
            torch.set_num_threads(before)


# Not finite, zero


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e5m2", "nvfp4", "e4m3fn@1x32", "mxint8"])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_block_only(backend: str, name: str, bad: float):
    x = numbers((3, 96), torch.float32)
    clean = on(backend, round_blocks, x[:1], name)
    x[1, 40], x[2, 95] = bad, bad
    stored = on(backend, halfstep.quantize_blocks, x, name)
    found = on(backend, BlockTensor.dequantize, stored)
    k = BlockFormat.parse(name).columns
    spoiled = torch.zeros(3, 96, dtype=torch.bool)
    spoiled[1, 40 // k * k : 40 // k * k + k] = spoiled[2, 95 // k * k :] = True
    assert torch.equal(found.isnan(), spoiled)
    assert (bits(found)[spoiled] == 0x7FC00000).all()
    assert stored.scales.float().isnan().sum() == 2
    if not BlockFormat.parse(name).has_tensor_scale:
        assert torch.equal(found[:1], clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EVERY)
def test_zeros_stay_zeros(backend: str, name: str):
    if name.startswith("binary"):
        pytest.skip("binary has no zero")
    x = torch.tensor([[0.0, -0.0] * 40])
    found = on(backend, round_blocks, x, name)
    assert (found == 0).all()
    signed = BlockFormat.parse(name).element.has_negative_zero
    assert torch.equal(found.signbit(), x.signbit() & signed)
    scales = on(backend, halfstep.quantize_blocks, x, name).scales.float()
    assert (scales == BlockFormat.parse(name).smallest_scale).all()


def test_extremes_of_float32():
    for name in EVERY:
        finite = specials()[specials().isfinite()].repeat(8)
        assert_back_ends_agree(finite, name, 0)
        assert_back_ends_agree(finite * 2.0**-110, name, 0)


# The public edge


def test_storage_saves_bytes():
    """nbytes is what is stored, and that is bits_per_element; 2^16 numbers."""
    x = torch.randn(64, 1024)
    for name in NAMED:
        f = BlockFormat.parse(name)
        b = halfstep.quantize_blocks(x, name)
        assert b.values.nbytes == x.numel() * f.element.bits // 8
        assert b.nbytes == x.numel() * f.bits_per_element / 8 + 4 * f.has_tensor_scale
    assert halfstep.quantize_blocks(x, "int5@1x8").values.shape == (64, 1024 * 5 // 8)


def test_dtypes_of_storage():
    x = torch.randn(4, 64)
    found = {
        n: (b.values.dtype, b.scales.dtype)
        for n in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "mxint8", "nvfp4", "e4m3@row", "fp16@row")
        for b in [halfstep.quantize_blocks(x, n)]
    }
    e8m0 = torch.float8_e8m0fnu
    assert found == {
        "mxfp8_e4m3": (torch.float8_e4m3fn, e8m0),
        "mxfp8_e5m2": (torch.float8_e5m2, e8m0),
        "mxfp4": (torch.uint8, e8m0),
        "mxint8": (torch.int8, e8m0),
        "nvfp4": (torch.uint8, torch.float8_e4m3fn),
        "e4m3@row": (torch.uint8, torch.float32),
        "fp16@row": (torch.float16, torch.float32),
    }


def test_shapes_of_scales():
    x = torch.randn(3, 70, 33)
    shapes = {
        ("mxfp4", -1): (3, 70, 2),
        ("mxfp4", 1): (3, 3, 33),
        ("e4m3fn@row", 0): (1, 70, 33),
        ("e4m3fn@tensor", -1): (1, 1, 1),
        ("e4m3fn@16x32", -1): (3, 5, 2),
        ("e4m3fn@16x32", 1): (3, 3, 3),
    }
    for (name, dim), shape in shapes.items():
        assert halfstep.quantize_blocks(x, name, dim).scales.shape == shape, (name, dim)


def test_layout_does_not_matter():
    x = numbers((24, 36), torch.float32)
    wide = torch.zeros(24, 72)
    wide[:, ::2] = x
    others = [x.t().contiguous().t(), wide[:, ::2], torch._neg_view(-x)]
    for name in ("mxfp4", "nvfp4", "e4m3fn@8x8"):
        for rounding in ("nearest", "stochastic"):
            right = on(BACKENDS[-1], round_blocks, x, name, 0, rounding)
            for other in others:
                assert torch.equal(
                    bits(on(BACKENDS[-1], round_blocks, other, name, 0, rounding)), bits(right)
                )
                out = torch.empty_like(other)
                assert on(BACKENDS[-1], round_blocks, other, name, 0, rounding, out=out) is out
                assert torch.equal(out, right)


def test_out_may_be_or_overlap_x():
    for name in ("mxfp4", "nvfp4", "e4m3fn@tensor", "e4m3fn@4x4"):
        x = numbers((40, 40), torch.float32)
        right = round_blocks(x, name)
        assert torch.equal(round_blocks(x, name, out=x), right)
        x = numbers((40, 40), torch.float32)
        right = round_blocks(x.t(), name)
        round_blocks(x.t(), name, out=x)
        assert torch.equal(x, right)
        flat = numbers((1000,), torch.float32)
        right = round_blocks(flat[:-1], name)
        round_blocks(flat[:-1], name, out=flat[1:])
        assert torch.equal(flat[1:], right)


def test_scalars():
    for dim in (-1, 0):
        x = torch.tensor(0.3)
        assert round_blocks(x, "mxfp4", dim).shape == ()
        b = halfstep.quantize_blocks(x, "mxfp4", dim)
        assert b.shape == ()
        assert b.dequantize().item() == round_blocks(x, "mxfp4").item() == 0.25


def test_gradients_pass_straight_through():
    for name in ("mxfp4", "nvfp4"):
        for rounds in (
            lambda x, name=name: round_blocks(x, name),
            lambda x, name=name: halfstep.quantize_blocks(x, name).dequantize(),
        ):
            x = torch.randn(2, 40, requires_grad=True)
            y = rounds(x)
            (y * torch.arange(40.0)).sum().backward()
            assert torch.equal(x.grad, torch.arange(40.0).expand(2, 40))
            with torch.no_grad():
                assert not rounds(x).requires_grad
            assert not rounds(x.detach()).requires_grad
    stored = halfstep.quantize_blocks(x.half(), name)
    assert not stored.detach().dequantize().requires_grad
    stored.dequantize(torch.float32).sum().backward()  # the gradient in x's dtype


def test_the_edge_keeps_no_tensor_alive():
    import weakref

    x = torch.randn(64, 64, requires_grad=True)
    y = x * 2
    kept = weakref.ref(y)
    stored = halfstep.quantize_blocks(y, "mxfp4")
    del y
    assert kept() is None
    stored.dequantize().sum().backward()
    assert torch.equal(x.grad, torch.full((64, 64), 2.0))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_torch_func_transforms():
    x = torch.randn(3, 40)

    def f(t: Tensor) -> Tensor:
        return round_blocks(t, "mxfp4")

    right = f(x)
    assert torch.equal(torch.func.vmap(f)(x), right)
    assert torch.equal(torch.func.grad(lambda t: f(t).pow(2).sum() / 2)(x), right)


def test_repr():
    b = halfstep.quantize_blocks(torch.ones(2, 64, dtype=torch.bfloat16), "e4m3fn@1x32:ceil", 1)
    text = "BlockTensor(e4m3fn@1x32:ceil, shape=(2, 64), dim=1, dtype=bfloat16, 132 bytes on cpu)"
    assert repr(b) == text
    assert b.dequantize().dtype is torch.bfloat16


def test_errors_say_what_is_allowed():
    x = torch.randn(4, 32)
    for call, text in [
        (lambda: round_blocks(x, "mxfp5"), "unknown block format 'mxfp5'; did you mean mxfp4"),
        (lambda: round_blocks(x, "mxfp4", 2), r"dim 2 of x with shape \(4, 32\); allowed: -2 to 1"),
        (lambda: round_blocks(x.int(), "mxfp4"), "x is torch.int32 .*; allowed: a dense tensor of"),
        (lambda: round_blocks([1.0], "mxfp4"), "x is a list; allowed"),
        (lambda: round_blocks(x, "binary@row", rounding="up"), "allowed: nearest, stochastic"),
        (lambda: round_blocks(x, "mxfp4", out=x.half()), "out is torch.float16.*must be as x"),
        (lambda: round_blocks(x, "mxfp4", out=x[:1].expand(4, 32)), "share one place"),
        (lambda: round_blocks(x, "mxfp4", out=[0]), "out is a list"),
        (lambda: round_blocks(x.requires_grad_(), "mxfp4", out=x), "cannot be differentiated"),
        (lambda: halfstep.quantize_blocks(x, "e2m1"), "unknown block format 'e2m1'; did you mean"),
        (lambda: halfstep.round_to(x, "mxfp4"), r"say halfstep.quantize_blocks\(x, 'mxfp4'\)"),
    ]:
        with pytest.raises(halfstep.errors.HalfstepError, match=text):
            call()


@pytest.mark.parametrize(
    "name", ["e4m3fn@tensor", "e5m2@tensor", "int8@tensor", "nvfp4", "nvfp4@16x16"]
)
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-40, 3e-38, 0.1, 1.0, 447.9, 2688.0, 3.4e38])
def test_one_scale_for_all_is_the_references(name: str, amax: float):
    """The native kernels find it in numbers of their own, and in Python's."""
    x = torch.linspace(-1.0, 1.0, 64).view(4, 16) * amax
    native = halfstep.quantize_blocks(x, name, backend="native")
    reference = halfstep.quantize_blocks(x, name, backend="reference")
    assert torch.equal(native.tensor_scale, reference.tensor_scale)
    assert torch.equal(native.scales.float(), reference.scales.float())
    assert torch.equal(native.dequantize(), reference.dequantize())
    one_call = round_blocks(x, name, backend="native")
    assert same_numbers(one_call, round_blocks(x, name, backend="reference")).all()
