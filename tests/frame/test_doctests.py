"""The examples in docstrings say what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import halfstep

MODULES = ["halfstep"] + [
    found.name
    for found in pkgutil.walk_packages(halfstep.__path__, "halfstep.")
    if not found.name.startswith("halfstep._core")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str):
    if name.startswith("halfstep.ops.triton_kernels."):
        pytest.importorskip("triton")  # an extra: `make test` installs it
    if name.startswith("halfstep.switching.frameworks."):
        pytest.importorskip(name.rpartition(".")[2])  # an extra, which `make test` does without
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
