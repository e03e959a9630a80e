"""Each failure has one cause: without that protection the task fails, without any other it holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FAILURES = Path(__file__).parents[2] / "examples" / "failures"

pytestmark = pytest.mark.slow


def wrong(script: str, recipe: str) -> float:
    """Percent of the test digits that the script, in the recipe, reads wrong."""
    command = [sys.executable, "-m", "halfstep", "run", "--quiet", "--recipe", recipe]
    done = subprocess.run(
        [*command, FAILURES / script, "--seed", "1"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found = re.search(r"^wrong ([\d.]+)%", done.stdout, re.MULTILINE)
    assert found is not None
    return float(found[1])


RECIPES = ("fp16", "fp16-noscale", "fp16-nomaster", "fp16-acc16")


@pytest.mark.parametrize(
    ("script", "culprit", "apart"),
    [
        # 1,000 digits, at most 22% wrong: three standard errors of a difference are 5.6 points
        ("small_gradients.py", "fp16-noscale", 5.6),
        ("small_updates.py", "fp16-nomaster", 5.6),
        # in percent of a page: a sixteenth of what the pages differ by among themselves (4.0)
        ("long_sums.py", "fp16-acc16", 0.25),
    ],
)
def test_only_the_missing_protection_fails(script, culprit, apart):
    fp32 = wrong(script, "fp32")
    for recipe in RECIPES:
        assert (wrong(script, recipe) > fp32 + apart) == (recipe == culprit), recipe


@pytest.mark.parametrize("script", ["small_gradients.py", "small_updates.py"])
def test_plain_16_bits_fail(script):
    assert wrong(script, "fp16-naive") > wrong(script, "fp32") + 5.6


@pytest.mark.parametrize("recipe", ["fp16-acc16-chunk64", "fp16-acc16-pairwise"])
def test_other_orders_repair_long_sums(recipe):
    assert wrong("long_sums.py", recipe) < wrong("long_sums.py", "fp32") + 0.25
