"""Which of torch's own operations no list of the emulator knows, and why: torch's table, run."""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import halfstep

# Operation below autograd -> why it is in no list.
UNLISTED = {
    "aten._sparse_mm_reduce_impl.default": "of sparse tensors, which are left alone",
    "aten._sparse_mm_reduce_impl_backward.default": "of sparse tensors, which are left alone",
    "aten.sparse_sampled_addmm.default": "of sparse tensors, which are left alone",
    "torch_nn._linear_cross_entropy_batch_chunked.default": "product and loss in one, of a library",
    "torch_nn._linear_cross_entropy_batch_chunked_no_reduction.default": "the same, a loss a row",
}


def op_db() -> list[Any]:
    """torch's table; the module wants a package for golden files that is not installed here."""
    stub: Any = types.ModuleType("expecttest")
    stub.TestCase = object
    known = sys.modules.get("expecttest")
    sys.modules.setdefault("expecttest", stub)
    try:
        from torch.testing._internal.common_methods_invocations import op_db as table
    finally:
        if known is None:
            del sys.modules["expecttest"]
    return table


def run(info: Any, sample: Any) -> None:
    out = info.op(sample.input, *sample.args, **sample.kwargs)
    each = out if isinstance(out, (tuple, list)) else [out]
    ends = [t for t in each if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    if ends:
        sum(t.sum() for t in ends).backward()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
def test_what_stays_unlisted_is_known():
    found: dict[str, set[str]] = {}
    for info in op_db():
        if torch.float32 not in info.dtypes:
            continue
        try:
            samples = info.sample_inputs("cpu", torch.float32, requires_grad=info.supports_autograd)
            first = list(itertools.islice(samples, 1))
        except Exception:  # a sample that needs what is not installed
            continue
        for sample in first:
            with warnings.catch_warnings(), halfstep.emulate("fp16") as emulation:
                warnings.simplefilter("ignore")
                with contextlib.suppress(Exception):  # what a sample cannot do is others' test
                    run(info, sample)
            for name in emulation.unknown:
                found.setdefault(name, set()).add(info.name)
    assert {name: where for name, where in found.items() if name not in UNLISTED} == {}


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (F.hardswish, "own"),
        (lambda x: torch.floor_divide(x, 0.37), "own"),
        (lambda x: torch.rsub(x, x), "own"),
        (lambda x: torch.slice_copy(x, 0, 1, 3), "move"),
        (lambda x: torch.narrow_copy(x, 0, 1, 3), "move"),
    ],
    ids=["hardswish", "floor_divide", "rsub", "slice_copy", "narrow_copy"],
)
def test_of_the_store_format_they_are_torchs_own(recipe: str, operation: Any, kind: str):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[recipe]
    x = torch.linspace(-5, 5, 1001)
    with halfstep.emulate(f"{recipe}:policy=paper") as emulation:
        out = operation(x)
    assert torch.equal(out, operation(x.to(dtype)).float())
    assert kind in emulation.operations and emulation.unknown == ()


@pytest.mark.parametrize("name", ["det", "slogdet", "eigh", "svd", "solve"])
def test_linear_algebra_computes_in_fp32(name: str):
    x = torch.eye(3) * 2 + 0.1
    arguments = (x, torch.ones(3)) if name == "solve" else (x,)
    with halfstep.emulate("fp16") as emulation:
        getattr(torch.linalg, name)(*arguments)
    assert "fp32" in emulation.operations and emulation.unknown == ()
