"""The public names: those of the design that exist so far, sorted, documented, lazily loaded."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import halfstep

# Section 3 of the design, what its functions return, and their like, and nothing else; a name enters
# `halfstep` with the code behind it.
DESIGNED = {
    "BlockTensor",
    "Format",
    "GradScaler",
    "Recipe",
    "autocast",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "doctor",
    "emulate",
    "formats",
    "machines",
    "matmul",
    "quantize_blocks",
    "recipes",
    "round_to",
    "switch",
    "watch",
}
NAMES = [name for name in halfstep.__all__ if name != "__version__"]


def test_names_are_the_designs_and_sorted():
    assert set(NAMES) <= DESIGNED
    assert halfstep.__all__ == sorted(halfstep.__all__)
    assert set(halfstep.__all__) <= set(dir(halfstep))


@pytest.mark.parametrize("name", NAMES)
def test_name_resolves_and_says_what_it_is(name: str):
    value = getattr(halfstep, name)
    assert callable(value)
    assert inspect.getdoc(value), f"halfstep.{name} has no docstring"
    assert value.__module__.startswith("halfstep."), "a foreign thing under our name"


def test_what_type_checkers_see_is_what_there_is():
    tree = ast.parse(Path(inspect.getfile(halfstep)).read_text())
    (checked,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imports == halfstep._PUBLIC


@pytest.mark.parametrize("name", halfstep._PACKAGES)
def test_packages_need_no_import_of_their_own(name: str):
    code = f"import halfstep; print(halfstep.{name}.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"halfstep.{name}"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'halfstep' has no attribute 'swich'"):
        _ = halfstep.swich
