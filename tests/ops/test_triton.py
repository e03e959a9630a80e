"""Triton's kernels against the reference, bit for bit: in the interpreter, or on a GPU that is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import halfstep
from adversarial import adversarial, bits, same_numbers, sixteen_bit_patterns, specials
from halfstep.errors import OperandError
from halfstep.format import Accumulator, Format, Rounding
from halfstep.ops import Backend, choose, count_nonfinite, explain, triton_kernels, unscale
from halfstep.ops.blocks import round_blocks

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIXTEEN = (torch.float16, torch.bfloat16)
_FORMATS = """
fp32 tf32 bf16 fp16 e5m2 e4m3fn e4m3 e3m2 e2m3 e2m1 int8 int4 ternary e6m9 e1m0 e1m5 e2m0 e3m0 e7m23
e8m1 e8m22 q3.5 q1.15 int24 e4m3fn:nan e5m2:nan fp16:saturate e1m0:saturate fp16:nan
"""
FORMATS = _FORMATS.split()


def on(backend: str, x: Tensor, format: str, rounding: str, **options) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return halfstep.round_to(x, format, rounding, generator=generator, backend=backend, **options)


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_equals_reference(format: str):
    x = adversarial(Format.parse(format), torch.float32)
    for rounding in Rounding:
        found = on("triton", x.to(DEVICE), format, rounding.value).cpu()
        right = on("reference", x, format, rounding.value)
        assert torch.equal(bits(found), bits(right)), rounding
    found = on("triton", x.to(DEVICE), format, "stochastic", random_bits=9).cpu()
    assert torch.equal(bits(found), bits(on("reference", x, format, "stochastic", random_bits=9)))


@pytest.mark.parametrize("source", SIXTEEN)
@pytest.mark.parametrize("format", ["tf32", "e4m3fn"])
def test_all_sixteen_bit_inputs(source: torch.dtype, format: str):
    x = sixteen_bit_patterns(source)
    for rounding in ("nearest", "stochastic"):
        right = on("reference", x.float(), format, rounding)
        out = torch.empty(x.shape, device=DEVICE)
        assert same_numbers(
            on("triton", x.to(DEVICE), format, rounding, out=out).cpu(), right
        ).all()


@pytest.mark.parametrize("source", [torch.float32, *SIXTEEN])
@pytest.mark.parametrize("target", SIXTEEN)
def test_sixteen_bit_outputs(source: torch.dtype, target: torch.dtype):
    x = adversarial(Format.parse("e4m3fn"), source)
    right = on("reference", x, "e4m3fn", "nearest", out=torch.empty(x.shape, dtype=target))
    out = torch.empty(x.shape, dtype=target, device=DEVICE)
    assert same_numbers(on("triton", x.to(DEVICE), "e4m3fn", "nearest", out=out).cpu(), right).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_layouts_sizes_and_places(rounding: str):
    """Views of x and out, in place, overlapping, of several programs, empty: the same numbers."""
    x = torch.randn(270, 260, generator=torch.Generator().manual_seed(2))
    right = on("reference", x, "e4m3fn", rounding)
    wide = torch.zeros(270, 520, device=DEVICE)
    wide[:, ::2] = x
    views = [
        x.to(DEVICE),
        x.to(DEVICE).t().contiguous().t(),
        wide[:, ::2],
        torch._neg_view(-x.to(DEVICE)),
    ]
    for view in views:
        assert torch.equal(on("triton", view, "e4m3fn", rounding).cpu(), right)
        before = view._version
        on("triton", view, "e4m3fn", rounding, out=view)
        assert torch.equal(view.cpu(), right)
        assert view._version > before
    flat = x.flatten().to(DEVICE)
    on("triton", flat[:-1], "e4m3fn", rounding, out=flat[1:])
    assert torch.equal(flat[1:].cpu(), right.flatten()[:-1])
    for shape in ((0,), (3, 0), ()):
        some = torch.full(shape, 1.3, device=DEVICE)
        assert torch.equal(on("triton", some, "e4m3fn", rounding, out=some), some)
        assert some.shape == shape


# Dot products


def product(backend: str, a: Tensor, b: Tensor, accumulate: str, start: Tensor | None) -> Tensor:
    device = DEVICE if backend == "triton" else "cpu"
    generator = torch.Generator().manual_seed(3)
    return halfstep.matmul(
        a.to(device),
        b.to(device),
        "fp32",
        accumulate,
        initial=None if start is None else start.to(device),
        generator=generator,
        backend=backend,
    ).cpu()


def operands(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return halfstep.round_to(torch.randn(*shape, generator=generator) * scale, "fp16")


ACCUMULATORS = """
fp16 fp32 bf16/toward_zero e6m9/away/chunk3/between-fp32 fp16/down e5m2/down/products-rounded
fp16/products-rounded/chunk3 q8.8 int8/up e4m3fn/chunk2/between-bf16 e8m21/chunk3/up fp32/stochastic
e6m9/stochastic/chunk2/between-fp32 bf16/stochastic/products-rounded/chunk3
"""


@pytest.mark.parametrize("accumulate", ACCUMULATORS.split())
def test_products_equal_reference(accumulate: str):
    """Numbers of order one; those that end subnormal; those that overflow."""
    for depth, scale in ((7, 1.0), (2, 2e-4), (3, 200.0)):
        scale = min(scale, 20.0) if accumulate.startswith("int8") else scale
        a, b = operands(5, depth, scale=scale), operands(depth, 6, scale=scale)
        start = operands(5, 6, scale=scale)
        found = product("triton", a, b, accumulate, start)
        assert torch.equal(bits(found), bits(product("reference", a, b, accumulate, start)))


@pytest.mark.parametrize("accumulate", ["fp16", "bf16/down"])
def test_products_of_any_operands(accumulate: str):
    """Any bits: infinities, NaN, zeros of both signs, numbers of every size."""
    x = adversarial(Format.parse(accumulate.partition("/")[0]), torch.float32)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:360]]
    a, b = x[:180].view(60, 3), x[180:].view(3, 60)
    right = product("reference", a, b, accumulate, None)
    assert same_numbers(product("triton", a, b, accumulate, None), right).all()


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((33, 1), (1, 40)),
        ((2, 1, 9, 2), (2, 2, 3)),
        ((4, 0), (0, 5)),
        ((0, 4), (4, 5)),
        ((2, 3, 4), (2, 4, 0)),
    ],
)
def test_shapes_and_strides_of_products(a_shape, b_shape):
    a, b = operands(*a_shape), operands(*b_shape)
    right = product("reference", a, b, "e6m9/stochastic", None)
    assert torch.equal(product("triton", a, b, "e6m9/stochastic", None), right)
    flipped = a.mT.contiguous().mT, b.mT.contiguous().mT
    assert torch.equal(product("triton", *flipped, "e6m9/stochastic", None), right)


def test_a_start_in_float64_is_rounded_once():
    a, b = torch.zeros(1, 1), torch.zeros(1, 1)
    start = torch.tensor([[1 + 2**-11 + 2**-40]], dtype=torch.float64)
    assert product("triton", a, b, "fp16", start).item() == 1 + 2**-10


@pytest.mark.parametrize(
    ("accumulate", "text"),
    [
        ("bf16/pairwise", "no Triton kernel adds as bf16/pairwise does"),
        ("fp16/kahan", "no Triton kernel adds as fp16/kahan does"),
        ("bf16/split2", "no Triton kernel adds as bf16/split2 does"),
        ("e8m22", "no Triton kernel adds in e8m22"),
        ("int24", "no Triton kernel adds in int24"),
        ("fp32/up", "no Triton kernel adds in fp32"),
        ("fp16/chunk4/between-e8m22", "no Triton kernel adds in e8m22"),
    ],
)
def test_what_products_cannot_is_said(accumulate: str, text: str):
    with pytest.raises(OperandError, match=f"{text}.*use backend='auto'"):
        product("triton", torch.ones(1, 1), torch.ones(1, 1), accumulate, None)


def test_units_are_left_to_the_reference():
    accumulator = Accumulator.parse("v100")
    assert triton_kernels.refuses_matmul(accumulator, [torch.ones(1, 1)]) == (
        "no Triton kernel adds as v100 does"
    )


# Blocks


def blocks(backend: str, x: Tensor, format: str, dim: int, rounding: str, **options) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return round_blocks(x, format, dim, rounding, generator=generator, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
@pytest.mark.parametrize(
    "format",
    [
        "mxfp8_e4m3",
        "mxfp8_e5m2:even",
        "mxfp6_e2m3:rceil",
        "mxfp4",
        "mxint8:ceil",
        "q1.7@1x16:floor",
    ],
)
def test_blocks_equal_reference(format: str, dtype: torch.dtype):
    """Every kind of number, some blocks of tiny ones; along the last axis and not, cut at the end."""
    generator = torch.Generator().manual_seed(4)
    x = adversarial(Format.parse("e4m3fn"), dtype)
    tiny = (torch.randn(2048, generator=generator) * 1e-38).to(dtype)
    x = torch.cat([x[torch.randperm(len(x), generator=generator)[:2000]], tiny])[:4004].view(
        4, 7, -1
    )
    for dim, rounding in ((-1, "nearest"), (1, "stochastic"), (0, "up")):
        found = blocks("triton", x.to(DEVICE), format, dim, rounding).cpu()
        right = blocks("reference", x, format, dim, rounding)
        assert same_numbers(found, right).all(), (dim, rounding)


def test_blocks_in_place_of_any_layout_and_of_other_kinds():
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(6))
    for format in ("mxfp4", "nvfp4", "e4m3fn@4x8", "mxint8"):
        right = blocks("reference", x, format, -1, "nearest")
        for view in (x.to(DEVICE, copy=True), x.to(DEVICE).t().contiguous().t()):
            blocks("triton", view, format, -1, "nearest", out=view)
            assert torch.equal(view.cpu(), right), format
    empty = torch.empty(3, 0, device=DEVICE)
    assert blocks("triton", empty, "mxfp4", -1, "nearest").shape == (3, 0)


# Gradients


def test_counts_equal_reference():
    square = torch.full((40, 50), torch.nan)
    tensors = [
        *(sixteen_bit_patterns(dtype) for dtype in SIXTEEN),
        specials(),
        specials().double(),
        torch.empty(0),
        torch.full((70_001,), torch.inf)[1:],
        square.t(),
        square[::2],
        torch.ones(3, dtype=torch.int64),
    ]
    found = count_nonfinite([t.to(DEVICE) for t in tensors], backend="triton")
    assert found == [2048, 256, 12, 12, 0, 70_000, 2000, 1000, 0]
    assert count_nonfinite([torch.empty(0, device=DEVICE)], backend="triton") == [0]


@pytest.mark.parametrize("scale", [65536.0, 3.0])
def test_unscaled_equals_reference(scale: float):
    generator = torch.Generator().manual_seed(8)
    tensors = [
        torch.randn(8, 3, 5, 7, generator=generator).half().to(memory_format=torch.channels_last),
        torch.randn(70_001, generator=generator).bfloat16()[1:],
        *(x[x.isfinite()] for x in map(sixteen_bit_patterns, SIXTEEN)),
        torch.randn(5, generator=generator),
        torch.randn(6, 6, generator=generator).half()[::2],
        torch.empty(0, 3).half(),
    ]
    found = unscale([t.to(DEVICE) for t in tensors], scale, backend="triton")
    for wide, x in zip(found, tensors, strict=True):
        assert torch.equal(bits(wide.cpu()), bits(x.float() / scale))
        assert wide.is_contiguous(memory_format=torch.channels_last) is x.is_contiguous(
            memory_format=torch.channels_last
        )


# Which back end


def test_the_interpreter_is_never_chosen_by_itself():
    choice = choose(
        "round_to",
        torch.device("cpu"),
        Backend.AUTO,
        tensors=[torch.ones(1, dtype=torch.float64)],
        asked=Format.parse("binary"),
    )
    assert choice.backend is Backend.REFERENCE
    assert ("round_to", "cpu", "triton") in {row[:3] for row in explain()}


@pytest.mark.parametrize(
    ("x", "format", "text"),
    [
        (torch.ones(1, dtype=torch.float64), "fp16", "no Triton kernel takes torch.float64"),
        (torch.ones(1), "binary", "binary has no Triton kernel"),
        (torch.ones(1), "e8m0", "e8m0 has no Triton kernel"),
    ],
)
def test_what_it_cannot_is_said(x: Tensor, format: str, text: str):
    with pytest.raises(OperandError, match=f"{text}.*use backend='auto'"):
        on("triton", x.to(DEVICE), format, "nearest")


WITHOUT_INTERPRETER = """
import sys, torch
import halfstep
from halfstep.format import Accumulator, Format, Rounding
from halfstep.ops import triton_kernels

def ask():
    try:
        halfstep.round_to(torch.ones(1), "fp16", backend="triton")
    except halfstep.errors.OperandError as error:
        print(error)

ask()
sys.modules["triton"] = None
triton_kernels.missing.cache_clear()
ask()
"""


def test_where_there_is_no_gpu_or_no_triton_it_says_so():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_INTERPRETER],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "only its interpreter does, for tests: set TRITON_INTERPRET=1 before triton" in said[0]
    assert "pip install 'halfstep[triton]'" in said[1]
