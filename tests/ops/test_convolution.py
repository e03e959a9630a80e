"""Convolutions against torch's on small integers, and against the definition in fractions."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import halfstep
import text_book
from halfstep import ops
from halfstep.errors import HalfstepError
from halfstep.format import Accumulator
from halfstep.ops import native, windows

SEED = 11


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small enough that every sum in these tests is exact, in FP32 and in FP16."""
    generator = torch.Generator().manual_seed(SEED + sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).to(dtype).requires_grad_()


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + sum(shape))
    return halfstep.round_to(torch.randn(*shape, generator=generator), "fp16").requires_grad_()


def each(*options: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    return itertools.product(*options)


def same_as_torch(name: str, tensors: Sequence[Tensor], *arguments: Any, **how: Any) -> None:
    right = getattr(F, name)(*tensors, *arguments)
    found = getattr(ops, name)(*tensors, *arguments, **how)
    assert found.shape == right.shape
    assert torch.equal(found, right)
    grad = integers(*right.shape).detach()
    wanted = torch.autograd.grad(right, tensors, grad)
    for got, want in zip(torch.autograd.grad(found, tensors, grad), wanted, strict=True):
        assert torch.equal(got, want)


SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 3)}
KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_is_torchs_where_sums_are_exact(dims: int):
    for stride, padding, dilation, groups in each([1, 2, 3], [0, 2], [1, 2], [1, 2]):
        x = integers(2, 4, *SIZES[dims])
        tensors = x, integers(6, 4 // groups, *KERNELS[dims]), integers(6)
        arguments = stride, padding, dilation, groups
        same_as_torch(f"conv{dims}d", tensors, *arguments)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_is_torchs_where_sums_are_exact(dims: int):
    for stride, padding, dilation, groups in each([1, 2, 3], [0, 1], [1, 2], [1, 2]):
        x = integers(2, 4, *SIZES[dims])
        tensors = x, integers(4, 6 // groups, *KERNELS[dims]), integers(6)
        more = max(stride, dilation) - 1
        arguments = stride, padding, more, groups, dilation
        same_as_torch(f"conv_transpose{dims}d", tensors, *arguments)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_by_name_is_torchs(dims: int, padding: str):
    for kernel, dilation in each([1, 2, 3, 4], [1, 2]):
        tensors = integers(2, 3, *[8] * dims), integers(2, 3, *[kernel] * dims)
        same_as_torch(f"conv{dims}d", tensors, None, 1, padding, dilation)


@pytest.mark.parametrize(
    ("name", "shapes", "arguments"),
    [
        ("conv2d", [(2, 4, 6, 9), (6, 2, 3, 2)], (None, (2, 3), (1, 4), (2, 1), 2)),
        ("conv2d", [(3, 5, 4, 4), (5, 1, 3, 3)], (None, 1, 1, 1, 5)),  # depthwise
        ("conv2d", [(2, 3, 2, 2), (2, 3, 1, 1)], (None, 3, 5)),  # windows beside the input
        ("conv1d", [(0, 3, 5), (2, 3, 3)], ()),
        ("conv2d", [(4, 5, 6), (2, 4, 2, 3)], (None, 2, 1)),
        ("conv_transpose2d", [(4, 5, 6), (4, 2, 2, 3)], (None, 2, 1)),
        ("conv3d", [(1, 2, 3, 4, 5), (2, 2, 3, 1, 2)], (None, (1, 2, 3), (2, 0, 1), (1, 3, 2))),
        ("conv_transpose2d", [(2, 4, 3, 4), (4, 3, 2, 3)], (None, (3, 1), (1, 2), (2, 0), 2, 1)),
        ("conv_transpose1d", [(1, 2, 4), (2, 2, 2)], (None, 4, 0, 3)),  # no term between strides
        ("conv_transpose3d", [(1, 2, 2, 3, 2), (2, 1, 2, 2, 2)], (None, (1, 2, 3), 0, 0, 1, 2)),
    ],
)
def test_arguments_by_dimension_are_torchs(name: str, shapes: list[Any], arguments: Any):
    same_as_torch(name, [integers(*shape) for shape in shapes], *arguments)


# --- the definition, one number at a time ---------------------------------------------------------


def places(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, sizes))


def value(t: list[Any], place: Sequence[int]) -> float:
    """t[place], or the zero outside of it."""
    here: Any = t
    for i in place:
        if not 0 <= i < len(here):
            return 0.0
        here = here[i]
    return here


def by_hand(
    shape: Sequence[int], terms: Callable[[tuple[int, ...]], list[tuple[float, float]]], how: str
) -> Tensor:
    out = torch.empty(shape)
    for place in places(shape):
        pairs = terms(place)
        left, right = [a for a, _ in pairs], [b for _, b in pairs]
        out[place] = text_book.dot(left, right, Accumulator.parse(how))
    return out


STRIDE, PADDING, DILATION, GROUPS = (2, 1), (1, 2), (1, 2), 2
HOWS = ["fp16", "bf16/chunk5", "e6m9/pairwise", "fp16/kahan", "bf16/split3/products-rounded"]


def moved(place: Sequence[int], k: Sequence[int]) -> tuple[int, ...]:
    """Where in the larger tensor stands what meets ``place`` of the smaller one at kernel k."""
    numbers = zip(place, STRIDE, PADDING, k, DILATION, strict=True)
    return tuple(at * s - p + j * d for at, s, p, j, d in numbers)


def met(place: Sequence[int], k: Sequence[int]) -> tuple[int, ...] | None:
    """The inverse; None between two strides."""
    numbers = zip(place, STRIDE, PADDING, k, DILATION, strict=True)
    parts = [divmod(at + p - j * d, s) for at, s, p, j, d in numbers]
    return None if any(rest for _, rest in parts) else tuple(whole for whole, _ in parts)


def output_by_hand(w: Tensor, x: Tensor, out: torch.Size, how: str) -> Tensor:
    of_x, of_w, channels, outputs = x.tolist(), w.tolist(), w.shape[1], w.shape[0] // GROUPS

    def terms(place: tuple[int, ...]) -> list[tuple[float, float]]:
        n, o, *at = place
        first = o // outputs * channels
        return [
            (value(of_w, (o, c, *k)), value(of_x[n][first + c], moved(at, k)))
            for c, *k in places(w.shape[1:])
        ]

    return by_hand(out, terms, how)


def input_by_hand(w: Tensor, y: Tensor, out: torch.Size, how: str) -> Tensor:
    of_y, of_w, channels, outputs = y.tolist(), w.tolist(), w.shape[1], w.shape[0] // GROUPS

    def terms(place: tuple[int, ...]) -> list[tuple[float, float]]:
        n, c, *at = place
        first = c // channels * outputs
        return [
            (value(of_w, (first + o, c % channels, *k)), value(of_y[n][first + o], where))
            for o, *k in places((outputs, *w.shape[2:]))
            if (where := met(at, k)) is not None
        ]

    return by_hand(out, terms, how)


def weight_by_hand(x: Tensor, y: Tensor, out: torch.Size, how: str) -> Tensor:
    of_x, of_y, outputs = x.tolist(), y.tolist(), out[0] // GROUPS

    def terms(place: tuple[int, ...]) -> list[tuple[float, float]]:
        o, c, *k = place
        channel = o // outputs * out[1] + c
        return [
            (value(of_x[n][channel], moved(at, k)), value(of_y[n][o], at))
            for n, *at in places((len(y), *y.shape[2:]))
        ]

    return by_hand(out, terms, how)


@pytest.mark.parametrize("how", HOWS)
def test_equals_fractions(how: str):
    x, w = numbers(2, 4, 5, 4), numbers(6, 2, 3, 2)
    y = ops.conv2d(x, w, None, STRIDE, PADDING, DILATION, GROUPS, accumulate=how)
    assert torch.equal(y, output_by_hand(w, x, y.shape, how))
    grad = numbers(*y.shape).detach()
    to_x, to_w = torch.autograd.grad(y, (x, w), grad)
    assert torch.equal(to_x, input_by_hand(w, grad, x.shape, how))
    assert torch.equal(to_w, weight_by_hand(x, grad, w.shape, how))


@pytest.mark.parametrize("how", HOWS)
def test_transposed_equals_fractions(how: str):
    y, w = numbers(2, 6, 3, 4), numbers(6, 2, 3, 2)
    arguments = STRIDE, PADDING, (1, 0), GROUPS, DILATION
    x = ops.conv_transpose2d(y, w, None, *arguments, accumulate=how)
    assert torch.equal(x, input_by_hand(w, y, x.shape, how))
    grad = numbers(*x.shape).detach()
    to_y, to_w = torch.autograd.grad(x, (y, w), grad)
    assert torch.equal(to_y, output_by_hand(w, grad, y.shape, how))
    assert torch.equal(to_w, weight_by_hand(grad, y, w.shape, how))


# --- what does not matter, and what does ----------------------------------------------------------


@pytest.mark.parametrize("how", ["fp16", "fp16/chunk3", "bf16/pairwise"])
def test_slabs_do_not_matter(how: str, monkeypatch: pytest.MonkeyPatch):
    x, w, y = numbers(3, 4, 5, 4), numbers(6, 2, 3, 2), numbers(3, 6, 3, 6)

    def everything() -> list[Tensor]:
        arguments = None, STRIDE, PADDING, DILATION, GROUPS
        out = ops.conv2d(x, w, *arguments, accumulate=how)
        return [out, *torch.autograd.grad(out, (x, w), y.detach())]

    whole = everything()
    for slab in (300, 3000):
        monkeypatch.setattr(windows, "_SLAB", slab)
        for got, right in zip(everything(), whole, strict=True):
            assert torch.equal(got, right)


def peak_memory(reset: bool = False) -> int:
    """Bytes; the peak since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.skipif(bool(native.MISSING), reason="the reference computes in float64")
@pytest.mark.parametrize("form", windows.Form)
def test_memory_is_bounded(form: windows.Form):
    """All windows of 3 x 3 at once would be 144 MB."""
    size = (512, 512)
    geometry = windows.Geometry(
        size=size, kernel=(3, 3), out=size, stride=(1, 1), before=(1, 1), dilation=(1, 1), groups=1
    )
    x, w, y = torch.ones(1, 16, *size), torch.ones(1, 16, 3, 3), torch.ones(1, 1, *size)
    if form is windows.Form.INPUT:  # it has the windows of y
        x, w, y = y, w.transpose(0, 1), x
    tensors = {windows.Form.INPUT: x, windows.Form.WEIGHT: w, windows.Form.OUTPUT: y}
    left, right = (tensors[operand] for operand in form.operands)
    before = peak_memory(reset=True)
    out = windows.convolve(form, left, right, geometry, Accumulator.parse("fp16"))
    assert peak_memory() - before < (64 << 20) + out.nbytes


def test_the_bias_is_added_after_the_sum_in_fp32():
    x, w = torch.full((1, 1, 2), 1024.0), torch.ones(1, 1, 2)
    bias = torch.tensor([1 + 2.0**-12])
    assert ops.conv1d(x, w, bias).item() == 2049 + 2.0**-12
    assert ops.conv_transpose1d(x, w, bias)[0, 0, 1].item() == 2049 + 2.0**-12


def test_zeros_of_the_padding_are_terms():
    """Chunks of 2: 2048 and two ones, which are lost one by one and not as a two."""
    x, w = torch.tensor([[[2048.0, 1.0, 1.0, 0.0]]]), torch.ones(1, 1, 4)
    assert ops.conv1d(x[..., :3], w[..., :3], chunk=2).item() == 2048
    assert ops.conv1d(x[..., :3], w, padding=(1,), chunk=2)[0, 0, 0].item() == 2050
    assert ops.conv1d(torch.ones(1, 1, 1), torch.full((1, 1, 3), torch.inf), padding=1).isnan()


def test_stochastic_sums_are_known_by_their_seed_and_differ_from_place_to_place():
    x, w = torch.full((1, 1, 4000), 1 / 3), torch.ones(1, 1, 20)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        how: Any = {"operands": "fp32", "accumulate": "bf16", "rounding": "stochastic"}
        return ops.conv1d(x, w, generator=generator, **how)

    sums = drawn(SEED)
    assert torch.equal(sums, drawn(SEED))
    assert not torch.equal(sums, drawn(SEED + 1))
    assert len(sums.unique()) > 3
    # 20 roundings, each of variance 1/4 unit^2 at most; the last binade's unit is 2^-5
    sigma = 2.0**-6 * (20 / sums.numel()) ** 0.5
    assert abs(sums.double().mean().item() - 20 / 3) < 4 * sigma + 20 * 2.0**-5 * 2.0**-17


def test_the_backward_has_formats_of_its_own():
    x, w = numbers(1, 2, 5), numbers(3, 2, 2)
    y = ops.conv1d(
        x,
        w,
        operands=("e4m3fn", "bf16"),
        accumulate="fp32",
        gradient="e5m2",
        grad_accumulate="e6m9",
    )
    grad = numbers(*y.shape).detach()
    to_x, to_w = torch.autograd.grad(y, (x, w), grad)
    low, x_low = halfstep.round_to(grad, "e5m2"), halfstep.round_to(x.detach(), "e4m3fn")
    w_low = halfstep.round_to(w.detach(), "bf16")
    right = ops.conv_transpose1d(low, w_low, operands="fp32", accumulate="e6m9")
    assert torch.equal(to_x, right)
    # of the weight: a convolution of the input by the gradient, over the batch
    right = ops.conv1d(
        x_low.transpose(0, 1), low.transpose(0, 1), operands="fp32", accumulate="e6m9"
    )
    assert torch.equal(to_w, right.transpose(0, 1))


def test_dtypes():
    x, w = torch.ones(1, 1, 3), torch.ones(1, 1, 3)
    assert ops.conv1d(x.half(), w.bfloat16()).dtype is torch.float32
    assert ops.conv1d(x.double(), w).dtype is torch.float64


def test_gradients_are_straight_through_twice():
    """Bilinear: on small integers, differences over 1 are exact."""
    x, w, b = (integers(*shape, dtype=torch.float64) for shape in ((2, 4), (2, 1, 2), (2,)))

    def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.conv1d(x, w, b, 2, 1, 2, 2)

    def transposed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.conv_transpose1d(x, w, b, 2, 1, 1, 2, 2)

    for function in (conv, transposed):
        assert torch.autograd.gradcheck(function, (x, w, b), eps=1.0, atol=0, rtol=0)
        grad = integers(*function(x, w, b).shape, dtype=torch.float64)
        assert torch.autograd.gradgradcheck(function, (x, w, b), grad, eps=1.0, atol=0, rtol=0)


X, W = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 2, 2)


@pytest.mark.parametrize(
    ("name", "arguments", "options", "text"),
    [
        ("conv2d", (X.int(), W), {}, "conv2d: input is torch.int32 of shape (1, 2, 4, 4)"),
        ("conv2d", (X, [1]), {}, "conv2d: weight is a list; allowed: a torch.Tensor"),
        (
            "conv2d",
            (X, W, None),
            {"groups": 2},
            "conv2d: input is (1, 2, 4, 4) on cpu and weight is (3, 2, 2, 2) on cpu, groups=2; wanted: ",
        ),
        ("conv2d", (X[None], W), {}, "conv2d: input is (1, 1, 2, 4, 4) on cpu"),
        (
            "conv_transpose2d",
            (X, W),
            {},
            "conv_transpose2d: input is (1, 2, 4, 4) on cpu and weight",
        ),
        ("conv2d", (X, W), {"groups": 0}, "conv2d: groups=0; allowed: a whole number from 1"),
        (
            "conv2d",
            (X, W),
            {"stride": 0},
            "conv2d: stride=0; allowed: a whole number from 1, or 2 of",
        ),
        (
            "conv2d",
            (X, W),
            {"padding": (1, 2, 3)},
            "conv2d: padding=(1, 2, 3); allowed: a whole number",
        ),
        ("conv2d", (X, W), {"padding": "sane"}, "unknown padding 'sane'; did you mean same?"),
        (
            "conv2d",
            (X, W),
            {"padding": "same", "stride": 2},
            "conv2d: padding='same' with stride=(2, 2); allowed: stride 1, or padding in numbers",
        ),
        (
            "conv2d",
            (X, W),
            {"dilation": 5},
            "conv2d: input (1, 2, 4, 4) with padding (0, 0) and (0, 0) is smaller than the kernel",
        ),
        (
            "conv2d",
            (X, W, torch.ones(2)),
            {},
            "conv2d: bias is (2,) on cpu; wanted: (3,) on cpu",
        ),
        (
            "conv_transpose2d",
            (X, W[:2]),
            {"output_padding": 1},
            "conv_transpose2d: output_padding=1; allowed: less than the stride or the dilation, (1, 1)",
        ),
        (
            "conv_transpose2d",
            (X, W[:2]),
            {"padding": 3},
            "conv_transpose2d: input (1, 2, 4, 4) and kernel (2, 2) with padding (3, 3) give a result",
        ),
        (
            "conv2d",
            (X, W),
            {"accumulate": "fp61"},
            "unknown format or unit 'fp61'; did you mean fp16",
        ),
        (
            "conv2d",
            (X, W),
            {"operands": ("fp16",)},
            "conv2d: operands=('fp16',); allowed: a format, or",
        ),
    ],
)
def test_errors_say_what_is_allowed(name: str, arguments: Any, options: Any, text: str):
    with pytest.raises(HalfstepError) as raised:
        getattr(ops, name)(*arguments, **options)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("name", ["conv1d", "conv3d", "conv_transpose2d"])
@pytest.mark.parametrize("keyword", ["acumulate", "initial", "sparse"])
def test_a_keyword_that_is_not_there_is_an_error(name: str, keyword: str):
    with pytest.raises(
        TypeError, match=rf"{name}\(\) got an unexpected keyword argument '{keyword}'"
    ):
        getattr(ops, name)(X, W, **{keyword: "fp16"})
