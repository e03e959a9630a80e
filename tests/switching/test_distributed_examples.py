"""The examples of training on many processes run as they say, under torchrun."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "distributed"
TORCHRUN = Path(sys.executable).with_name("torchrun")
EXAMPLES = sorted(FOLDER.glob("*.py"))


def torchrun(*words: object) -> str:
    done = subprocess.run(
        [TORCHRUN, "--standalone", "--nproc-per-node", "2", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(said: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+) loss (\S+)", said)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in EXAMPLES if p.stem != "elastic"], ids=lambda path: path.stem
)
def test_example_learns(path):
    found = losses(torchrun(path))
    assert list(found) == [5, 10, 15, 20]
    assert found[20] < found[5]


@pytest.mark.slow
def test_a_killed_rank_costs_no_loss(tmp_path):
    wanted = losses(torchrun(FOLDER / "elastic.py", tmp_path / "whole.pt"))
    script = ("--max-restarts", 3, FOLDER / "elastic.py", tmp_path / "run.pt", "--kill")
    found = losses(torchrun(*script))
    assert len(wanted) == 20
    # The line of the step that it was killed behind may be missing; no step is another.
    assert set(wanted) - set(found) <= {8}
    assert {step: wanted[step] for step in found} == found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 60
