"""`count_nonfinite` on both back ends."""

from __future__ import annotations

import math

import pytest
import torch

from adversarial import sixteen_bit_patterns, specials
from halfstep.errors import OperandError
from halfstep.ops import count_nonfinite, native

NATIVE_SETS = [] if native.MISSING else native._core.instruction_sets()
BACKENDS = ["reference", *NATIVE_SETS]


def on(backend: str, tensors: list[torch.Tensor]) -> list[int]:
    if backend == "reference":
        return count_nonfinite(tensors, backend="reference")
    with native.instruction_set(backend):
        return count_nonfinite(tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pattern(backend: str):
    """Of 2^16 patterns 2 * 2^10 of float16 and 2 * 2^7 of bfloat16 have the top exponent."""
    half, brain = (sixteen_bit_patterns(d) for d in (torch.float16, torch.bfloat16))
    wide = specials()
    assert on(backend, [half, brain, wide, wide.double()]) == [2048, 256, 12, 12]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sizes_and_layouts(backend: str, dtype: torch.dtype):
    tensors = []
    expected = []
    for n in (0, 1, 31, 4097, 2**17, 2**18 + 5):
        x = torch.zeros(n, dtype=dtype)
        places = range(0, n, 1 + n // 7)
        for place in places:
            x[place] = (math.inf, -math.inf, math.nan)[place % 3]
        tensors.append(x)
        expected.append(len(places))
    assert on(backend, tensors) == expected
    square = torch.full((40, 50), math.nan, dtype=dtype)
    views = [square.t(), square[::2], square[0, 0], square[:1].expand(3, 50)]
    assert on(backend, views) == [2000, 1000, 1, 150]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_infinite_does_not_overflow_the_counter(backend: str):
    x = torch.full((2**17 - 1,), math.inf, dtype=torch.float16)
    assert on(backend, [x]) == [2**17 - 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_integers_parameters_and_nothing(backend: str):
    coo = torch.sparse_coo_tensor([[0, 0, 2]], [3e38, 3e38, 1.0], (4,), check_invariants=True)
    parameter = torch.nn.Parameter(torch.tensor([math.nan]))
    integers = torch.ones(3, dtype=torch.int64)
    assert on(backend, [coo, parameter, integers]) == [1, 1, 0]
    assert on(backend, []) == []


def test_what_is_no_tensor_is_refused():
    with pytest.raises(OperandError) as raised:
        count_nonfinite([torch.ones(1), None])  # type: ignore[list-item]
    assert str(raised.value) == (
        "count_nonfinite: element 1 is a NoneType; allowed: a torch.Tensor"
    )
