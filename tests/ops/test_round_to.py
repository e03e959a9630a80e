"""`round_to`: both back ends against the text-book codec and each other, and the public edge."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import halfstep
from adversarial import adversarial, around_the_grid, bits, same_numbers, sixteen_bit_patterns
from halfstep.format import Format, Kind, Rounding, round_number
from halfstep.ops import native

_EVERY = """
fp32 tf32 bf16 fp16 e5m2 e4m3fn e4m3 e3m2 e2m3 e2m1 e8m0 int8 int4 ternary binary e6m9
e1m0 e1m5 e2m0 e3m0 e7m23 e8m1 e8m22 q3.5 q1.15 int24 e4m3fn:nan e5m2:nan fp16:saturate
fp16:nan e4m3fnuz e5m2fnuz binary8p1se binary8p1sf binary8p3se binary8p4sf binary8p7se
fp32:flush bf16:flush e8m0 e8m22:flush fp16:flush e4m3fn:nan:flush e3m0:flush e5m0 binary8p1se:flush
e7m0:flush int8:wrap q3.5:wrap int24:wrap e8m23 e1m0:saturate
"""
EVERY = _EVERY.split()
_FEW = "fp16 e4m3fn e2m1 bf16 int8 q3.5 binary fp16:flush bf16:flush binary8p1se int8:wrap e8m0"
FEW = _FEW.split()
ROUNDINGS = [r.value for r in Rounding]
DETERMINISTIC = [r for r in ROUNDINGS if r != "stochastic"]
NATIVE_SETS = [] if native.MISSING else native._core.instruction_sets()
BACKENDS = ["reference", *NATIVE_SETS]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def on(backend: str, x: Tensor, format: str, rounding: str = "nearest", seed: int = 7, **options):
    """The result on the reference, or on the native kernels of one instruction set."""
    generator = torch.Generator().manual_seed(seed)
    if backend == "reference":
        return halfstep.round_to(
            x, format, rounding, generator=generator, backend="reference", **options
        )
    with native.instruction_set(backend):
        return halfstep.round_to(x, format, rounding, generator=generator, **options)


def allowed(format: str, rounding: str) -> bool:
    return format != "binary" or rounding in ("nearest", "stochastic")


# Against the text-book


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_codec(backend: str, format: str):
    f = Format.parse(format)
    x = torch.cat([around_the_grid(f), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:400]]
    for rounding in DETERMINISTIC:
        if allowed(format, rounding):
            found = on(backend, x, format, rounding)
            right = [round_number(v, f, Rounding(rounding)) for v in x.tolist()]
            right = torch.tensor([float(v) for v in right], dtype=torch.float64)
            assert same_numbers(found, right).all(), rounding


@pytest.mark.parametrize("format", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [32, 7])
def test_stochastic_equals_the_codec_at_the_same_draws(format: str, dtype: torch.dtype, bits: int):
    from halfstep.ops import draw_key, random_bits

    f = Format.parse(format)
    x = adversarial(f, dtype)[::29]
    x = x[~x.isnan()]
    key = draw_key(torch.Generator().manual_seed(7))
    draws = random_bits(key, x.shape, x.device).tolist()
    right = [
        float(round_number(v, f, Rounding.STOCHASTIC, Fraction(draw >> 32 - bits, 2**bits)))
        for v, draw in zip(x.tolist(), draws, strict=True)
    ]
    for backend in BACKENDS:
        found = on(backend, x, format, "stochastic", random_bits=bits)
        assert same_numbers(found, torch.tensor(right, dtype=dtype)).all(), backend


# Native against the reference, bit for bit


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_equals_reference(format: str, dtype: torch.dtype):
    x = adversarial(Format.parse(format), dtype)
    for rounding in ROUNDINGS:
        if allowed(format, rounding):
            right = bits(on("reference", x, format, rounding))
            for backend in NATIVE_SETS:
                found = bits(on(backend, x, format, rounding))
                assert torch.equal(found, right), (rounding, backend)


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("format", ["fp16", "bf16", "e5m2", "e4m3fn", "e6m9", "tf32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_sixteen_bit_inputs(format: str, dtype: torch.dtype):
    x = sixteen_bit_patterns(dtype)
    for rounding in ROUNDINGS:
        right = on("reference", x.float(), format, rounding)
        for backend in NATIVE_SETS:
            out = torch.empty(x.shape)
            assert on(backend, x, format, rounding, out=out) is out
            assert same_numbers(out, right).all(), (rounding, backend)


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_from_every_dtype_to_every_dtype(source: torch.dtype, target: torch.dtype):
    """e4m3fn fits them all; NaN too arrives, and in float64 to float32 one rounding is made."""
    for size in (1, 9, 4097, 70000):
        x = adversarial(Format.parse("e4m3fn"), source).repeat(20)[:size]
        for rounding in ("nearest", "stochastic"):
            right = on("reference", x, "e4m3fn", rounding, out=torch.empty(size, dtype=target))
            for backend in NATIVE_SETS:
                out = torch.empty(size, dtype=target)
                found = on(backend, x, "e4m3fn", rounding, out=out)
                assert same_numbers(found, right).all(), (rounding, backend, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["fp16", "e5m2", "e4m3fn", "int8", "e4m3fn:nan"])
def test_half_in_half_out(backend: str, format: str):
    x = sixteen_bit_patterns(torch.float16)
    for rounding in ROUNDINGS:
        right = on("reference", x.float(), format, rounding).half()
        assert same_numbers(on(backend, x, format, rounding), right).all()
        inplace = x.clone()
        assert same_numbers(on(backend, inplace, format, rounding, out=inplace), right).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_rounded_once(backend: str):
    """1 + 2^-11 + 2^-40 is above the middle between 1 and 1 + 2^-10; not so in float32."""
    x = torch.tensor([1 + 2**-11 + 2**-40], dtype=torch.float64)
    assert on(backend, x, "fp16").item() == 1 + 2**-10
    assert on(backend, x.float(), "fp16").item() == 1.0
    out = torch.empty(1)
    assert on(backend, x, "fp16", out=out).item() == 1 + 2**-10


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]


def integers(dtype: torch.dtype) -> Tensor:
    """The ends of the range and around its powers of two, and any others."""
    if dtype is torch.bool:
        return torch.tensor([False, True])
    ends = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(6)
    powers = 1 << torch.arange(ends.bits - (ends.min < 0))
    near = (powers[:, None] + torch.tensor([-3, -2, -1, 0, 1, 2, 3])).flatten()
    # between them: ties of every format, and what is next to those
    near = torch.cat([near, near + near // 2, near + near // 16, near + near // 2 + near // 2**11])
    near = torch.cat([near, torch.randint(ends.min, ends.max, (500,), generator=generator)])
    near = torch.cat([near, -near, torch.tensor([ends.min, ends.max])])
    return near[(near >= ends.min) & (near <= ends.max)].to(dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(
    "format", ["fp16", "e4m3fn:nan", "fp32", "e8m0", "int8:wrap", "int32", "q3.5"]
)
def test_integers_are_rounded_once(format: str, dtype: torch.dtype):
    f = Format.parse(format)
    x = integers(dtype)
    for rounding in DETERMINISTIC:
        right = [float(round_number(Fraction(v), f, Rounding(rounding))) for v in x.tolist()]
        for backend in BACKENDS:
            found = on(backend, x, format, rounding)
            assert found.dtype is (torch.float64 if format == "int32" else torch.float32)
            right_here = torch.tensor(right, dtype=torch.float64).to(found.dtype)
            assert same_numbers(found, right_here).all(), (rounding, backend)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("target", DTYPES)
def test_integers_of_all_dtypes_to_all(dtype: torch.dtype, target: torch.dtype):
    x = integers(dtype).repeat(3)
    for rounding in ("nearest", "stochastic"):
        right = on("reference", x, "e4m3fn", rounding, out=torch.empty(len(x), dtype=target))
        for backend in NATIVE_SETS:
            found = on(backend, x, "e4m3fn", rounding, out=torch.empty(len(x), dtype=target))
            assert torch.equal(found, right), (rounding, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_format_into_float64(backend: str):
    """float32 does not hold int32's largest, so that the rounding is not made there."""
    out = torch.empty(3, dtype=torch.float64)
    on(backend, torch.tensor([3e9, -3e9, 0.6]), "int32", out=out)
    assert out.tolist() == [2**31 - 1, -(2**31), 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_are_suffixes(backend: str):
    x = adversarial(Format.parse("fp16"), torch.float32)[::7]
    for format, suffixed, options in [
        ("fp16", "fp16:nan:flush", {"overflow": "nan", "subnormals": "flush"}),
        ("fp16:nan:flush", "fp16", {"overflow": "inf", "subnormals": "keep"}),
        ("int8", "int8:wrap", {"overflow": "wrap"}),
    ]:
        found = on(backend, x, format, **options)
        assert same_numbers(found, on(backend, x, suffixed)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_quiet_and_keeps_sign_and_payload(backend: str):
    x = torch.tensor([0x7F800001, 0x7FC12345, -0x007FEDCB], dtype=torch.int32).view(torch.float32)
    for format in ("fp16", "e4m3fn", "int8", "e2m1", "e8m0", "binary"):
        found = bits(on(backend, x, format)).tolist()
        assert found == [0x7FC00001, 0x7FC12345, -0x007FEDCB | 0x00400000], format


@pytest.mark.parametrize("backend", BACKENDS)
def test_subnormals_survive_flush_to_zero(backend: str):
    if backend == "reference":
        pytest.skip("the reference is torch's arithmetic, which the setting is for")
    x = torch.tensor([1e-40, -1e-40, 3e-41])
    right = on(backend, x, "bf16")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        found = on(backend, x, "bf16")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(found), bits(right))
    assert found[0] != 0


# Layouts


def views(x: Tensor) -> dict[str, Tensor]:
    """The same 24 x 36 numbers, in other layouts."""
    wide = torch.zeros(24, 72)
    wide[:, ::2] = x
    return {
        "contiguous": x,
        "transposed": x.t().contiguous().t(),
        "strided": wide[:, ::2],
        "offset": torch.cat([torch.zeros(1), x.flatten()])[1:].view(24, 36),
        "negative": torch._neg_view(-x),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_layout_does_not_matter(backend: str, rounding: str):
    x = torch.randn(24, 36, generator=torch.Generator().manual_seed(2))
    right = on(backend, x, "e4m3fn", rounding)
    for name, view in views(x).items():
        assert torch.equal(on(backend, view, "e4m3fn", rounding), right), name
        for out_name, out in views(torch.zeros(24, 36)).items():
            found = on(backend, view, "e4m3fn", rounding, out=out)
            assert found is out
            assert torch.equal(out, right), (name, out_name)
    expanded = x[:1].expand(24, 36)
    assert torch.equal(
        on(backend, expanded, "e4m3fn", rounding),
        on(backend, expanded.contiguous(), "e4m3fn", rounding),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_out_may_be_or_overlap_x(backend: str, rounding: str):
    def fresh() -> Tensor:
        return torch.randn(40, 40, generator=torch.Generator().manual_seed(3))

    right = on(backend, fresh(), "fp16", rounding)
    x = fresh()
    on(backend, x, "fp16", rounding, out=x)
    assert torch.equal(x, right)
    x = fresh()  # the transpose of x, written over x
    on(backend, x.t(), "fp16", "nearest", out=x)
    assert torch.equal(x, on(backend, fresh(), "fp16").t())
    flat = fresh().flatten()  # shifted by one
    on(backend, flat[:-1], "fp16", "nearest", out=flat[1:])
    assert torch.equal(flat[1:], on(backend, fresh(), "fp16").flatten()[:-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_and_scalar(backend: str, dtype: torch.dtype):
    for shape in [(0,), (3, 0, 2), ()]:
        x = torch.full(shape, 1.3, dtype=dtype)
        for rounding in ROUNDINGS:
            found = on(backend, x, "e4m3fn", rounding)
            assert found.shape == x.shape
            assert found.dtype == dtype
    assert on(backend, torch.tensor(1.3, dtype=dtype), "e4m3fn").item() == 1.25


@pytest.mark.parametrize("backend", NATIVE_SETS)
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 63, 1000, 2**17 - 1, 2**20 + 3, 2**20 + 4099])
def test_sizes_threads_and_streaming(backend: str, n: int):
    """Odd sizes and starts, one and two threads, with and without streaming stores (>= 4 MiB)."""
    x = torch.randn(n + 3, generator=torch.Generator().manual_seed(n))
    before = torch.get_num_threads()
    for rounding in ("nearest", "stochastic"):
        for offset in (0, 3):
            part = x[offset : offset + n]
            right = on("reference", part, "e6m9", rounding)
            try:
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    store = torch.full((n + 8,), 9.0)
                    out = store[offset : offset + n]
                    on(backend, part, "e6m9", rounding, out=out)
                    assert torch.equal(out, right)
                    assert (store[:offset] == 9).all()
                    assert (store[offset + n :] == 9).all()
            finally:
                torch.set_num_threads(before)


# Gradient and bookkeeping of torch


def test_gradient_passes_straight_through():
    x = torch.randn(5, requires_grad=True)
    y = halfstep.round_to(x, "e2m1")
    (y * torch.arange(5.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(5.0))
    assert not halfstep.round_to(x.detach(), "e2m1").requires_grad
    with torch.no_grad():
        assert not halfstep.round_to(x, "e2m1").requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_torch_func_transforms():
    x = torch.randn(2, 5)

    def f(t: Tensor) -> Tensor:
        return halfstep.round_to(t, "e2m1")

    right = f(x)
    assert torch.equal(torch.func.vmap(f)(x), right)
    assert torch.equal(torch.func.grad(lambda t: f(t).pow(2).sum() / 2)(x), right)
    per_sample = torch.func.vmap(torch.func.grad(lambda t: f(t).pow(2).sum() / 2))(x)
    assert torch.equal(per_sample, right)
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, torch.ones_like(x)))
        value, tangent = forward_ad.unpack_dual(dual)
        assert torch.equal(value, right)
        assert torch.equal(tangent, torch.ones_like(x))


def test_inference_mode():
    with torch.inference_mode():
        x = torch.randn(5)
        out = torch.empty(5)
        assert halfstep.round_to(x, "e2m1", out=out) is out
        assert torch.equal(halfstep.round_to(x, "e2m1"), out)
    assert torch.equal(halfstep.round_to(x, "e2m1"), out)


def test_writing_in_place_is_seen_by_autograd():
    x = torch.randn(5)
    w = torch.randn(5, requires_grad=True)
    y = w * x
    halfstep.round_to(x, "e2m1", out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_meta_tensors_and_subclasses_take_the_reference():
    assert halfstep.round_to(torch.empty(3, device="meta"), "fp16").device.type == "meta"
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert halfstep.round_to(torch.empty(3), "fp16").shape == (3,)


# Without the extension

WITHOUT = """
import sys, warnings
sys.modules["halfstep._core"] = None  # what an import of a missing module finds
import torch, halfstep
from halfstep.ops import choose, Backend
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [halfstep.round_to(torch.tensor([0.1]), "fp16").item() for _ in range(2)]
assert found == [0.0999755859375] * 2, found
texts = [str(w.message) for w in caught]
assert len(texts) == 1 and texts[0].startswith(
    "halfstep runs without its native kernels, more slowly: the extension halfstep._core is not"
), texts
try:
    halfstep.round_to(torch.tensor([0.1]), "fp16", backend="native")
except halfstep.errors.OperandError as error:
    assert "the extension halfstep._core is not there" in str(error), error
else:
    raise SystemExit("native kernels without an extension")
"""


def test_package_works_without_the_extension():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=120)


STALE = """
import halfstep._core
halfstep._core.sources = "those of last week"
from halfstep.ops import native
assert native.MISSING.startswith(
    "the extension halfstep._core is older than its sources; build it again: `make setup`"
), native.MISSING
"""


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
def test_an_extension_older_than_its_sources_is_not_used():
    subprocess.run([sys.executable, "-c", STALE], check=True, timeout=120)


# Laws

finite32 = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(deadline=None)
@given(
    st.lists(finite32, min_size=1, max_size=40),
    st.integers(2, 8),
    st.integers(0, 23),
    st.sampled_from(DETERMINISTIC),
)
def test_laws_of_rounding(values: list[float], exponent: int, mantissa: int, rounding: str):
    """Idempotent, monotone, odd where the rounding is, and within one spacing."""
    name = f"e{exponent}m{mantissa}"
    if name == "e8m0":  # MX's scale, which has no sign and no zero
        return
    x = torch.tensor(values)
    y = halfstep.round_to(x, name, rounding)
    assert torch.equal(bits(halfstep.round_to(y, name, rounding)), bits(y))
    assert (y[x.argsort()].diff().nan_to_num(0) >= 0).all()
    mirrored = {"up": "down", "down": "up"}.get(rounding, rounding)
    assert torch.equal(bits(halfstep.round_to(-x, name, mirrored)), bits(-y))
    inside = x.abs() <= Format.parse(name).max
    if rounding in ("nearest", "away"):
        low, high, middle = (
            halfstep.round_to(x, name, r).double() for r in ("down", "up", rounding)
        )
        least = torch.minimum(x - low, high - x)  # at most half a spacing
        assert ((middle - x).abs() == least)[inside].all()
    down, up = halfstep.round_to(x, name, "down"), halfstep.round_to(x, name, "up")
    assert ((down <= y) & (y <= up))[inside].all()
    assert ((down <= x) & (x <= up))[inside].all()


def test_kinds_are_all_covered():
    assert {Format.parse(name).kind for name in EVERY} == set(Kind)


@pytest.mark.skipif(not NATIVE_SETS, reason="needs the extension")
def test_several_python_threads_at_once():
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(4))
    right = on("reference", x, "e6m9", "stochastic")

    def call(_: int) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return halfstep.round_to(x, "e6m9", "stochastic", generator=generator)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, right) for found in pool.map(call, range(16)))
