"""Under torchrun: every process is launched, the first one speaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
TORCHRUN = Path(sys.executable).with_name("torchrun")


@pytest.mark.slow
def test_two_processes_have_equal_gradients_and_skip_the_same_step():
    command = [
        TORCHRUN,
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "halfstep",
        "run",
        "ranks.py",
    ]
    done = subprocess.run(
        command, cwd=SCRIPTS, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{step} True {step != 2} True" for step in range(5)]
    spoken = [line for line in done.stderr.splitlines() if line.startswith("halfstep: ")]
    steps = "DistributedDataParallel(Sequential), AdamW: 5 steps, 1 skipped"
    assert spoken[1:] == [
        f"halfstep: {steps}; loss scale 32768 to 65536",
        "halfstep: 5 backward passes",
    ]
