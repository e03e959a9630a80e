"""`round_to` in graphs: torch.compile, torch.export, make_fx and dispatch modes, against eager.

The other ops: test_compile_products.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import halfstep
from halfstep import ops
from halfstep.errors import OperandError
from halfstep.format import Format, Overflow, Rounding, Specials, Subnormals
from halfstep.ops.custom import format_of

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
# torch's own, in its compiler
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
MINE = Format(name="mine", exponent_bits=3, mantissa_bits=4, bias=4, specials=Specials.NONE)
OTHER_FP16 = Format(name="fp16", exponent_bits=3, mantissa_bits=2, bias=1)


def compiled(f: Callable[..., Any], backend: str, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    if backend == "inductor":  # else it leaves out conversions to 16 bits and back that eager makes
        options["options"] = {"emulate_precision_casts": True}
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("format", "rounding"),
    [
        ("fp16", "nearest"),
        ("e4m3fn:nan", "up"),
        (torch.float8_e5m2, Rounding.AWAY),
        (Format.parse("e6m9"), "toward_zero"),
        (MINE, "nearest"),
        (OTHER_FP16, "nearest"),
        ("e2m1", "stochastic"),
    ],
)
def test_compiled_equals_eager(format: Any, rounding: Any, backend: str):
    """Results and gradients, two calls in one graph and two calls of it: the same numbers drawn."""

    def f(x: Tensor) -> Tensor:
        y = halfstep.round_to(x * 2, format, rounding)
        return y * halfstep.round_to(x.detach(), format, rounding)

    g = compiled(f, backend)
    runs = []
    for function in (f, g):
        torch.manual_seed(5)
        x = numbers(40, 3).requires_grad_()
        values = [function(x) for _ in range(2)]
        (values[0] * torch.arange(3.0) + values[1]).sum().backward()
        runs.append([*values, x.grad])
    assert all(map(torch.equal, *runs))
    if rounding == "stochastic":
        assert not torch.equal(*runs[0][:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_out_is_written(rounding: str, backend: str):
    def f(x: Tensor, out: Tensor) -> Tensor:
        halfstep.round_to(x + 1, "e4m3fn", rounding, out=out)
        return out * 2

    found = torch.empty(50)
    right = torch.empty(50)
    torch.manual_seed(3)
    twice = compiled(f, backend)(numbers(50), found)
    torch.manual_seed(3)
    assert torch.equal(twice, f(numbers(50), right))
    assert torch.equal(found, right)


def test_options_and_integers():
    def f(x: Tensor) -> Tensor:
        y = halfstep.round_to(x, "e4m3fn", overflow="nan", subnormals=Subnormals.FLUSH)
        z = halfstep.round_to(x * 1000, "int8", "stochastic", overflow=Overflow.WRAP, random_bits=3)
        return (
            y + z + halfstep.round_to((x * 9).int(), "e3m2") + halfstep.round_to(x.long(), "int32")
        )

    torch.manual_seed(1)
    found = compiled(f, "aot_eager")(numbers(100) * 300)
    torch.manual_seed(1)
    assert torch.equal(found.nan_to_num(7), f(numbers(100) * 300).nan_to_num(7))
    assert found.dtype is torch.float64


def test_shapes_may_be_dynamic():
    g = compiled(lambda x: halfstep.round_to(x, "e2m1"), "aot_eager", dynamic=True)
    for shape in [(3, 5), (7, 2), (4, 4)]:
        x = numbers(*shape)
        assert torch.equal(g(x), halfstep.round_to(x, "e2m1"))
        assert torch.equal(g(x.t()), halfstep.round_to(x.t(), "e2m1"))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_vmap_inside_a_compiled_function(rounding: str):
    """Every example has the bits that it would have alone."""

    def f(x: Tensor) -> Tensor:
        return halfstep.round_to(x, "e2m1", rounding)

    batched = compiled(lambda x: torch.func.vmap(f, in_dims=1)(x), "aot_eager")
    x = numbers(6, 4)
    torch.manual_seed(8)
    rows = batched(x)
    for row, column in zip(rows, x.unbind(1), strict=True):
        torch.manual_seed(8)
        assert torch.equal(row, f(column))


def test_a_generator_breaks_the_graph_and_is_obeyed():
    def f(x: Tensor, generator: torch.Generator) -> Tensor:
        return halfstep.round_to(x + 0.1, "e2m1", "stochastic", generator=generator) + 1

    torch._dynamo.reset()
    found = torch.compile(f, backend="aot_eager")(numbers(50), torch.Generator().manual_seed(4))
    assert torch.equal(found, f(numbers(50), torch.Generator().manual_seed(4)))
    with pytest.raises(Exception, match=r"leave generator= away and seed torch's own"):
        compiled(f, "aot_eager")(numbers(50), torch.Generator())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: halfstep.round_to(x, "fp61"), "unknown format 'fp61'; did you mean "),
        (lambda x: halfstep.round_to(x, "fp16", "nearset"), "unknown rounding 'nearset'; did you"),
        (lambda x: halfstep.round_to(x, "int32"), "which does not hold every number of int32"),
        (lambda x: halfstep.round_to(x, "binary", "up"), "binary has no rounding 'up'"),
        (lambda x: halfstep.round_to(x, "fp16", out=x[1:]), "it must be as x"),
    ],
)
def test_errors_come_when_the_graph_is_made(call: Callable[[Tensor], Tensor], text: str):
    with pytest.raises(Exception, match=text):
        compiled(call, "aot_eager")(numbers(4))


class Rounds(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return halfstep.round_to(x * 3, "e4m3fn")


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool):
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Rounds(), (numbers(4, 3),), dynamic_shapes=({0: batch},), strict=strict
    )
    assert "halfstep.round_to.default" in program.graph_module.code
    x = numbers(9, 3)
    assert torch.equal(program.module()(x), Rounds()(x))


def test_make_fx_records_the_node():
    graph = make_fx(lambda x: halfstep.round_to(x, "e2m1"))(numbers(4))
    assert "halfstep.round_to.default" in graph.code
    x = numbers(4) + 1
    assert torch.equal(graph(x), halfstep.round_to(x, "e2m1"))


def test_modes_and_subclasses():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Names():
        halfstep.round_to(numbers(3), "fp16")
    assert "halfstep.round_to.default" in seen
    assert halfstep.round_to(torch.empty(3, device="meta"), "fp16").device.type == "meta"
    with FakeTensorMode():
        x = torch.empty(3, 4)
        assert halfstep.round_to(x, "fp16", "stochastic").shape == (3, 4)
        assert halfstep.round_to(x, "fp16", out=x) is x
    assert halfstep.round_to(x, "fp16").shape == (3, 4)  # outside of its mode


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_node_keeps_pytorchs_rules(rounding: str):
    seed = torch.tensor(5) if rounding == "stochastic" else None
    rest = ("nan", "flush", 20, "auto")
    x = numbers(5).requires_grad_()
    torch.library.opcheck(torch.ops.halfstep.round_to.default, (x, "e4m3fn", rounding, seed, *rest))
    out = torch.empty(5)
    torch.library.opcheck(
        torch.ops.halfstep.round_into.default, (out, numbers(5), "fp16", rounding, seed, *rest)
    )


def test_a_format_of_another_process_is_an_error():
    with pytest.raises(OperandError, match="'mine' was given as an object to the process"):
        format_of("mine#77")


def test_what_is_no_node_runs_between_graphs():
    """Same numbers, twice: no address of a tensor was taken for a constant."""

    def f(x: Tensor) -> Tensor:
        return x * ops.count_nonfinite([x * 2, x / 0])[1]

    torch._dynamo.reset()
    function = torch.compile(f, backend="aot_eager")
    for size in (3, 5):
        assert torch.equal(function(torch.ones(size)), torch.full((size,), float(size)))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph=True away"):
        compiled(f, "eager")(numbers(4, 4))
