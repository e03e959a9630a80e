"""The examples in the docstrings of `halfstep.format` and `halfstep.ops` are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import halfstep.format
import halfstep.ops

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (halfstep.format, halfstep.ops)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
