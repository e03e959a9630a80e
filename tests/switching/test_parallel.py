"""Several processes train one model: one verdict on every step, gradients of one process, one checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "parallel.py"
KINDS = ["ddp", "ddp-later", "no_sync", "zero", "fully_shard", "tensor", "compression", "kept"]


def run(ranks: int, folder: Path, *kinds: str) -> None:
    logs = [folder / f"rank{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, SCRIPT, str(rank), str(ranks), folder, *kinds]
            processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "".join(log.read_text() for log in logs)
    assert codes == [0] * ranks, said
    assert [f"{kind} ok" in said for kind in kinds] == [True] * len(kinds), said


def test_two_processes_agree(tmp_path):
    run(2, tmp_path, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_kind_of_parallel_training(tmp_path, ranks):
    run(ranks, tmp_path, *(k for k in KINDS if ranks == 2 or k != "tensor"))


@pytest.mark.slow
def test_compiled_models_too(tmp_path):
    run(2, tmp_path, "ddp+compiled", "ddp-later+compiled", "fully_shard+compiled")
