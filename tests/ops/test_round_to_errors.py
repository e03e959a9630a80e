"""What `round_to` refuses, and in which words."""

from __future__ import annotations

import pytest
import torch

import halfstep
from halfstep.errors import FormatError, OperandError, UnknownNameError
from halfstep.ops import native


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: halfstep.round_to([1.0], "fp16"),  # type: ignore[arg-type]
            OperandError,
            "round_to: x is a list; allowed: a torch.Tensor",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2, dtype=torch.complex64), "fp16"),
            OperandError,
            (
                "round_to: x is torch.complex64; allowed: torch.float32, torch.float64, torch.float16, "
                "torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, "
                "torch.bool; convert it first"
            ),
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", "stochastic", random_bits=33),
            OperandError,
            "round_to: random_bits=33; allowed: 1 to 32",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", overflow="wrap"),
            FormatError,
            "fp16:wrap: overflow to wrap, which this format cannot; allowed: saturate, inf, nan",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", overflow="infinite"),
            UnknownNameError,
            "unknown overflow 'infinite'; did you mean inf",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", subnormals="flsh"),
            UnknownNameError,
            "unknown subnormals 'flsh'; did you mean flush?",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2).to_sparse(), "fp16"),
            OperandError,
            "round_to: x has layout torch.sparse_coo; allowed: torch.strided; round its values()",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2).bfloat16(), "fp16"),
            OperandError,
            (
                "round_to: x is torch.bfloat16, which does not hold every number of fp16; allowed: "
                "torch.float32, torch.float64, torch.float16; convert x first, or pass an out= of"
            ),
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "int32"),
            OperandError,
            (
                "round_to: x is torch.float32, which does not hold every number of int32; allowed: "
                "torch.float64; "
            ),
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "e6m9", out=torch.ones(2).half()),
            OperandError,
            "round_to: out is torch.float16, which does not hold every number of e6m9; ",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", out=torch.ones(3)),
            OperandError,
            "round_to: out is (3,) on cpu (torch.strided); it must be as x: (2,) on cpu",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", out=torch.ones(1).expand(2)),
            OperandError,
            "round_to: out has stride (0,): several elements share one place, as after expand()",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", out=torch.ones(2).int()),
            OperandError,
            "round_to: out is torch.int32; allowed: ",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", out=1.0),  # type: ignore[arg-type]
            OperandError,
            "round_to: out is a float; allowed: a torch.Tensor",
        ),
        (
            lambda: halfstep.round_to(
                torch.ones(2, requires_grad=True), "fp16", out=torch.empty(2)
            ),
            OperandError,
            "round_to: out= cannot be differentiated; leave it away, or use torch.no_grad()",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "binary", "up"),
            OperandError,
            "round_to: binary has no rounding 'up'; allowed: nearest, stochastic",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", "nearset"),
            UnknownNameError,
            "unknown rounding 'nearset'; did you mean nearest?",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp61"),
            UnknownNameError,
            "unknown format 'fp61'; did you mean ",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", backend="nativ"),
            UnknownNameError,
            "unknown backend 'nativ'; did you mean native?",
        ),
        (
            lambda: halfstep.round_to(torch.ones(2, device="meta"), "fp16", backend="native"),
            OperandError,
            (
                "round_to on meta: backend 'native' cannot: native runs on cpu, not meta; "
                "use backend='auto'"
            ),
        ),
        (
            lambda: halfstep.round_to(torch.ones(2), "fp16", "stochastic", generator=0),  # type: ignore[arg-type]
            OperandError,
            "generator is a int; allowed: a torch.Generator (torch.Generator().manual_seed(0)), or None",
        ),
        pytest.param(
            lambda: halfstep.round_to(torch.ones(2), "binary", backend="native"),
            OperandError,
            "round_to on cpu: backend 'native' cannot: binary has no native kernel; ",
            marks=pytest.mark.skipif(bool(native.MISSING), reason="needs the extension"),
        ),
    ],
)
def test_errors_say_what_is_allowed(call, error, text: str):  # type: ignore[no-untyped-def]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("name", "same"),
    [("nearest-even", "nearest"), ("nearest_away", "away"), ("toward-zero", "toward_zero")],
)
def test_roundings_have_synonyms(name: str, same: str):
    x = torch.tensor([2.5, 3.5, -2.5, 2.7])
    assert torch.equal(halfstep.round_to(x, "int8", name), halfstep.round_to(x, "int8", same))
    assert torch.equal(
        halfstep.matmul(x, x, "fp16", "e5m2", rounding=name),
        halfstep.matmul(x, x, "fp16", "e5m2", rounding=same),
    )
