"""Dot products and block formats in graphs: one node each, equal to eager bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import halfstep
from halfstep import ops
from halfstep.errors import OperandError
from halfstep.format import Accumulator, BlockFormat, Format, Order, Specials, Unit
from halfstep.ops.arithmetic import Arithmetic, arithmetic_of

from .test_compile import BACKENDS, compiled, pytestmark  # noqa: F401 - the warnings of torch

MINE = Format(name="mine of 3", exponent_bits=3, mantissa_bits=4, bias=4, specials=Specials.NONE)
SUMS = Accumulator.parse("fp16/chunk4/between-fp32")
OWN_SUMS = Accumulator(adder=MINE, between=MINE, chunk=3)
V100 = Unit.parse("v100")
CEIL = BlockFormat.parse("mxint8:ceil")
matmul = halfstep.matmul


def numbers(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W1, W2, WT, W3 = numbers(4, 8, 3), numbers(2, 1, 3, 3), numbers(1, 2, 3, 3), numbers(4, 1, 2, 2, 2)


def weighted(w: Tensor, x: Tensor) -> Tensor:
    """Weights that depend on x by no sum of torch's, whose order a compiler chooses."""
    return w * x.flatten()[: w.numel()].view(w.shape)


# of x (8, 32)
CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda x: matmul(x, x.mT),
    "own formats": lambda x: matmul(
        x, x.mT, ("e4m3fn", MINE), SUMS, gradient=torch.float8_e5m2, grad_accumulate=OWN_SUMS
    ),
    "vectors": lambda x: matmul(x[0], x.mT) + matmul(x, x[1], order=Order.PAIRWISE),
    "broadcast": lambda x: matmul(x.view(2, 1, 4, 32), x.view(2, 32, 4), accumulate="bf16"),
    "initial": lambda x: matmul(x, x.mT, initial=x[:, :1], accumulate="fp16/kahan"),
    "sparse": lambda x: matmul(x, x.mT, sparse="b", accumulate="e6m9"),
    "stochastic": lambda x: (
        matmul(x, x.mT, accumulate="e5m2/stochastic")
        + matmul(x, x.mT, accumulate="fp32", grad_accumulate="e5m2/stochastic")
    ),
    "unit": lambda x: matmul(x, x.mT, accumulate=V100, grad_accumulate="h100/chunk8"),
    "16 bits": lambda x: matmul(x.half(), x.mT.bfloat16()),
    "float64": lambda x: matmul(x.double(), x.mT, "tf32", "fp16/split2"),
    "integers": lambda x: x * matmul((9 * x).int(), x.mT.mul(9).int(), "int8", "int32")[:, :1],
    "conv1d": lambda x: ops.conv1d(x[None], weighted(W1, x), padding="same", accumulate=SUMS),
    "conv2d": lambda x: ops.conv2d(
        x[None, None], weighted(W2, x), None, 2, 1, operands=("e4m3fn", "fp16"),
        accumulate="e5m2/stochastic",
    ),
    "conv3d": lambda x: ops.conv3d(x.view(1, 2, 4, 2, 16), weighted(W3, x), groups=2),
    "transposed": lambda x: ops.conv_transpose2d(
        x[None, None], weighted(WT, x), WT[0, :, 0, 0], stride=2, grad_accumulate="bf16"
    ),
    "round_blocks": lambda x: (
        ops.round_blocks(x, "mxfp4") + ops.round_blocks(x, CEIL, 0, "stochastic")
    ),
    "round_blocks out": lambda x: x * ops.round_blocks(x.detach(), "nvfp4", out=x.detach() + 1),
    "nvfp4": lambda x: halfstep.quantize_blocks(x, "nvfp4").dequantize(),
    "quantize": lambda x: (
        halfstep.quantize_blocks(x, CEIL, 0, "stochastic").dequantize(torch.float64)
    ),
    "packed": lambda x: halfstep.quantize_blocks(x.bfloat16(), "mxfp6_e3m2", -2).dequantize(),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager(name: str, backend: str):
    """Results and gradients of a whole graph, twice: no tensor's address was taken for a constant."""

    def f(x: Tensor) -> Tensor:
        return CASES[name](x * 2) + 1

    g = compiled(f, backend)
    for seed in (1, 2):
        runs = []
        for function in (f, g):
            torch.manual_seed(5)
            x = numbers(8, 32, seed=seed).requires_grad_()
            y = function(x)
            (y * y).sum().backward()
            runs.append((y, x.grad))
        assert all(map(torch.equal, *runs))
        assert runs[0][1].any()


def test_shapes_may_be_dynamic():
    def f(x: Tensor, w: Tensor) -> Tensor:
        y = matmul(x, x.mT, accumulate="fp16/chunk4") + ops.round_blocks(x, "mxfp4").sum()
        z = halfstep.quantize_blocks(x, "mxfp6_e2m3").dequantize().sum()
        return y.sum() + ops.conv1d(x[None], w[:, None].expand(2, len(x), 3)).sum() + z

    g = compiled(f, "aot_eager", dynamic=True)
    runs: list[list[Tensor]] = [[], []]
    for shape in [(3, 36), (7, 40), (5, 8)]:
        for function, run in zip((f, g), runs, strict=True):
            x, w = numbers(*shape).requires_grad_(), numbers(2, 3)
            function(x, w).backward()
            run.append(x.grad)
    assert all(map(torch.equal, *runs))


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(numbers(5, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = ops.conv1d(x[:, None], self.w, accumulate="fp16/chunk2")
        z = halfstep.quantize_blocks(matmul(y, y.mT), "mxfp4")
        return ops.round_blocks(z.dequantize() + 1, "mxfp8_e4m3")


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, tmp_path: Any):
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Layers(), (numbers(4, 32),), dynamic_shapes=({0: batch},), strict=strict
    )
    for name in ("convolve", "matmul", "quantize_blocks", "dequantize_blocks", "round_blocks"):
        assert f"halfstep.{name}.default" in program.graph_module.code
    torch.export.save(program, tmp_path / "it.pt2")
    x = numbers(9, 32)
    right = Layers()(x)
    assert torch.equal(program.module()(x), right)
    assert torch.equal(torch.export.load(tmp_path / "it.pt2").module()(x), right)


def test_make_fx_and_fake_tensors():
    graph = make_fx(lambda x: matmul(x, x.mT))(numbers(4, 4))
    assert "halfstep.matmul.default" in graph.code
    x = numbers(4, 4, seed=3)
    assert torch.equal(graph(x), matmul(x, x.mT))
    with FakeTensorMode():
        x = torch.empty(3, 8)
        assert matmul(x, x.mT, "int8", "int32").dtype is torch.float64
        assert halfstep.quantize_blocks(x, "mxfp4").values.shape == (3, 4)
    assert matmul(torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")).shape == (3,)


HOW = arithmetic_of("matmul", accumulate="e5m6/stochastic", gradient="e4m3fn").text
PLAIN = arithmetic_of("matmul", accumulate="fp16/chunk2").text
CONV1D = [9, 3, 4, 2, 0, 1, 1]  # halfstep.ops.windows.Geometry.numbers


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("matmul", lambda x: (x, numbers(2, 9, 4), numbers(4), PLAIN, None, [])),
        ("matmul", lambda x: (x, x.mT, None, HOW, torch.tensor(5), [1, -2])),
        ("convolve", lambda x: (numbers(5, 3, 3), x[None], "y", CONV1D, PLAIN, None, [])),
        ("round_blocks", lambda x: (x, "mxfp4", 0, "stochastic", torch.tensor(5), "auto")),
        ("quantize_blocks", lambda x: (x.detach(), "nvfp4", -1, "nearest", None, "auto")),
        ("round_blocks_into", lambda x: (torch.empty(3, 9), x.detach(), "mxfp4", 1, "up", None, "auto")),
    ],
)  # fmt: skip
def test_the_nodes_keep_pytorchs_rules(name: str, arguments: Callable[[Tensor], Any]):
    x = numbers(3, 9).requires_grad_()
    torch.library.opcheck(getattr(torch.ops.halfstep, name).default, arguments(x))


def test_dequantize_keeps_pytorchs_rules():
    b = halfstep.quantize_blocks(numbers(3, 64), "e2m1@1x16")
    edge = torch.empty(3, 64, requires_grad=True)
    rest = (edge, [3, 64], 1, "e2m1@1x16", "auto", torch.bfloat16)
    torch.library.opcheck(
        torch.ops.halfstep.dequantize_blocks.default, (b.values, b.scales, b.tensor_scale, *rest)
    )


@pytest.mark.parametrize("form", ["matmul", "convolve"])
def test_the_derivatives_of_a_node_have_derivatives(form: str):
    """Those of the eager op, bit for bit."""
    gradients = []
    for through_node in (False, True):
        x, w = numbers(1, 3, 9).requires_grad_(), numbers(5, 3, 3).requires_grad_()
        if form == "matmul":
            a, b = x.view(9, 3), w.view(3, 15)
            node = torch.ops.halfstep.matmul
            y = node(a, b, None, PLAIN, None, []) if through_node else matmul(
                a, b, accumulate="fp16/chunk2"
            )  # fmt: skip
        elif through_node:
            rounded = halfstep.round_to(w, "fp16"), halfstep.round_to(x, "fp16")
            y = torch.ops.halfstep.convolve(*rounded, "y", CONV1D, PLAIN, None, [])
        else:
            y = ops.conv1d(x, w, stride=2, accumulate="fp16/chunk2")
        first = torch.autograd.grad((y * y).sum(), (x, w), create_graph=True)
        gradients.append(torch.autograd.grad(sum((g * g).sum() for g in first), (x, w)))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: matmul(x, x[1:]), "wanted: "),
        (lambda x: matmul(x, x, "fp61"), "unknown format 'fp61'; did you mean "),
        (lambda x: matmul(x, x, accumulate="fp16/chunk"), "unknown word of an accumulator 'chunk'"),
        (lambda x: matmul(x, x, "bf16", V100), "unit v100 .*: operands bf16 times bf16"),
        (lambda x: ops.conv1d(x, x), "wanted: .*spatial"),
        (lambda x: ops.round_blocks(x, "mxfp5"), "unknown block format"),
        (lambda x: halfstep.quantize_blocks(x, "mxfp4", 2), "dim 2 of x"),
    ],
)
def test_errors_come_when_the_graph_is_made(call: Callable[[Tensor], Any], text: str):
    with pytest.raises(Exception, match=text):
        compiled(call, "aot_eager")(numbers(4, 4))


@pytest.mark.parametrize(
    "accumulate", ["fp16", "v100", SUMS, OWN_SUMS, "e6m9/stochastic/products-rounded/split3"]
)
def test_the_text_of_an_arithmetic_means_it(accumulate: Any):
    for operands in ("fp16", ("e4m3fn:nan", MINE)):
        if accumulate == "v100" and operands != "fp16":
            continue
        gradient = "fp16" if accumulate == "v100" else "e5m2"
        it = arithmetic_of("matmul", accumulate=accumulate, operands=operands, gradient=gradient)
        assert Arithmetic.of_text(it.text) == it
        assert ("#" in it.text) == (accumulate is OWN_SUMS or operands != "fp16")


def test_an_arithmetic_of_another_process_is_an_error():
    with pytest.raises(OperandError, match="was given as an object to the process that made"):
        Arithmetic.of_text("fp16 mine fp16 auto none fp16 fp16#99")
