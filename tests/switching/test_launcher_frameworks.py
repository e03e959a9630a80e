"""Scripts of Accelerate, Lightning and Hugging Face's Trainer, in a recipe without a word to them."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
HALFSTEP = Path(sys.executable).with_name("halfstep")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("framework", "precision", "summary", "chance"),
    [
        ("accelerate", "no", "Sequential, AdamW: 8 steps, none skipped", math.log(2)),
        ("accelerate", "bf16", "Sequential, AdamW: 8 steps, none skipped", math.log(2)),
        ("lightning", "32", "Sequential, AdamW: 16 steps, none skipped", math.log(2)),
        ("lightning", "bf16-mixed", "Sequential, AdamW: 16 steps, none skipped", math.log(2)),
        ("transformers", "no", "GPT2LMHeadModel, AdamW: 20 steps, none skipped", math.log(64)),
        ("transformers", "bf16", "GPT2LMHeadModel, AdamW: 20 steps, none skipped", math.log(64)),
        ("transformers", "checkpointed", "GPT2LMHeadModel, AdamW: 20 steps", math.log(64)),
    ],
)
def test_a_framework(framework, precision, summary, chance):
    pytest.importorskip(framework)
    done = subprocess.run(
        [HALFSTEP, "run", f"with_{framework}.py", precision],
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    loss = re.search(r"^loss ([\d.]+)", done.stdout, re.MULTILINE)
    assert loss is not None
    assert float(loss[1]) < 0.9 * chance  # it has learnt: untrained, the loss is that of chance
    assert f"halfstep: {summary}" in done.stderr
    assert ("the script's torch.autocast" in done.stderr) == ("bf16" in precision)
