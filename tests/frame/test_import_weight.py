"""`import halfstep` is light: no torch, no numpy, under a tenth of a second."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "torch._dynamo", "numpy", "rich", "typer", "scipy", "plotly")


def loaded_by(statement: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*(set({HEAVY!r}) & set(sys.modules)))"
    return set(_python(code).split())


def seconds_for(statement: str) -> float:
    """The best of five fresh interpreters, so that a busy machine does not decide."""
    code = (
        f"import time\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    )
    return min(float(_python(code)) for _ in range(5))


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import halfstep",
        "import halfstep; halfstep.Recipe.parse('16-mixed')",
        "import halfstep.format, halfstep.recipe, halfstep.errors",
    ],
)
def test_nothing_heavy_is_loaded(statement: str):
    assert loaded_by(statement) == set()


def test_the_command_line_is_loaded_without_torch():
    assert not loaded_by("import halfstep.cli") & {"torch", "numpy"}


def test_the_arithmetic_is_loaded_without_torchs_compiler():
    assert "torch._dynamo" not in loaded_by(
        "import halfstep.ops; halfstep.matmul, halfstep.round_to"
    )


def test_import_takes_less_than_a_tenth_of_a_second():
    assert seconds_for("import halfstep") < 0.1


def test_these_guards_can_fail():
    assert loaded_by("import numpy") == {"numpy"}
    assert seconds_for("import time; time.sleep(0.11)") > 0.1
