"""The table of the architectures, written down with where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from halfstep.study.architectures.outcomes import CONFIDENCE, Outcome, widest
from halfstep.study.architectures.program import BATCHES, STEPS
from halfstep.study.architectures.runner import versions
from halfstep.study.benchmarks.harness import Machine, write_record

__all__ = ["save_outcomes"]


def save_outcomes(
    rows: Sequence[Outcome], machine: Machine, *, command: str, directory: Path
) -> tuple[Path, Path]:
    """Writes ``architectures_<machine>_<date>.json`` and ``.md``; returns the paths."""
    return write_record(
        [row.as_dict() for row in rows],
        machine,
        theme="architectures",
        command=command,
        directory=directory,
        page=_lines(rows),
    )


def _lines(rows: Sequence[Outcome]) -> list[str]:
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items())
    architectures = {row.architecture for row in rows}
    seeds = max((len(row.fp32) for row in rows), default=2)
    met = sum(row.met for row in rows)
    lines = f"""\
Versions: {libraries}

{len(architectures)} architectures, {STEPS} steps of AdamW on {BATCHES} batches.
{met} of {len(rows)} rows met.

- 1 - cosine: of the first gradient to FP32's, in evaluation mode; at most 1e-3 in fp16, 1e-2 in bf16,
  5e-2 in 8 bits.
- off: distance of the loss from the mean of {seeds} FP32 seeds, in units of their prediction interval:
  one more FP32 run is within {widest(seeds):.2f} with {CONFIDENCE:.0%} probability.
- skipped: steps that finding the loss scale cost; FP32 is then without as many.
- run: losses of `halfstep run` on the unmodified program against those of `halfstep.switch`.

| architecture | kind | parameters | recipe | 1 - cosine | loss | FP32 | off | skipped | run | met |
|---|---|---|---|---|---|---|---|---|---|---|""".splitlines()
    for row in rows:
        same_seed = row.fp32[0] if row.fp32 else math.nan
        lines.append(
            f"| {row.architecture} ({row.model}) | {row.kind} | {row.parameters} | {row.recipe} "
            f"| {1 - row.cosine:.1e} | {row.after:.4f} | {same_seed:.4f} | {row.deviation:+.2f} "
            f"| {row.skipped} | {'same' if row.same else 'differs'} | {'yes' if row.met else 'no'} |"
        )
    failures = [row for row in rows if row.error]
    if failures:
        lines += ["", *(f"- {row.architecture}, {row.recipe}: {row.error}" for row in failures)]
    return lines
