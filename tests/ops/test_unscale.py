"""`unscale` on both back ends."""

from __future__ import annotations

import pytest
import torch

from adversarial import sixteen_bit_patterns
from halfstep.ops import native, unscale

NATIVE_SETS = [] if native.MISSING else native._core.instruction_sets()
BACKENDS = ["reference", *NATIVE_SETS]


def on(backend: str, tensors: list[torch.Tensor], scale: float):
    if backend == "reference":
        return unscale(tensors, scale, backend="reference")
    with native.instruction_set(backend):
        return unscale(tensors, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 65536.0, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_pattern_as_torch_casts_and_divides(backend: str, dtype: torch.dtype, scale: float):
    x = sixteen_bit_patterns(dtype)
    (wide,) = on(backend, [x], scale)
    expected = x.float() / scale
    nan = expected.isnan()
    assert torch.equal(wide.view(torch.int32)[~nan], expected.view(torch.int32)[~nan])
    assert torch.equal(wide.isnan(), nan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_sizes(backend: str):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 5, 7).half()
    given = [
        x,
        x.to(memory_format=torch.channels_last),
        x.permute(3, 0, 2, 1),
        x[::2, :, 1:],  # holes: passed to the reference
        x[:1, :1, :1, 0].expand(4, 1, 1),
        torch.empty(0, 3).half(),
        torch.tensor(2.0).half(),
        torch.randn(70_001).bfloat16(),
        torch.randn(5),
    ]
    given[0][1, 1, 1, 1] = torch.inf
    wide = on(backend, given, 4.0)
    for w, g in zip(wide, given, strict=True):
        assert torch.equal(w, g.float() / 4.0)
        assert w.shape == g.shape
        assert w.data_ptr() != g.data_ptr() or not g.numel()
    assert wide[1].stride() == given[1].stride()
    assert wide[2].stride() == given[2].stride()
