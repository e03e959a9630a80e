"""Every architecture in every recipe, by ``halfstep.switch`` and by ``halfstep run``, each in processes of
its own: what crashes is a row.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfstep.study.architectures.catalogue import ARCHITECTURES
from halfstep.study.architectures.outcomes import Outcome

__all__ = ["Resumed", "outcomes", "versions"]

_LIMIT = 300
_MODULES = "halfstep.study.architectures"


def versions() -> dict[str, str]:
    """Of everything a figure depends on."""
    return {name: version(name) for name in ("halfstep", "torch", "transformers", "diffusers")}


class Resumed:
    """Rows that are there already, in a file with one a line; those of other versions do not count."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._rows: dict[tuple[str, str], Outcome] = {}
        if file is None or not file.exists():
            return
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last one may be half written
                record = json.loads(line)
                if record.get("versions") == versions():
                    row = Outcome.from_dict(record)
                    self._rows[row.architecture, row.recipe] = row

    def get(self, architecture: str, recipe: str) -> Outcome | None:
        """The row, if it is there."""
        return self._rows.get((architecture, recipe))

    def add(self, row: Outcome) -> None:
        """Written at once, so that an interruption loses nothing."""
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row.as_dict() | {"versions": versions()}) + "\n")


def outcomes(
    names: Sequence[str], recipes: Sequence[str], *, jobs: int, resumed: Resumed
) -> Iterator[Outcome]:
    """The rows, as they are measured, ``jobs`` architectures at a time; those of ``resumed`` first."""
    missing: dict[str, list[str]] = {}
    for name in names:
        for recipe in recipes:
            row = resumed.get(name, recipe)
            if row is None:
                missing.setdefault(name, []).append(recipe)
            else:
                yield row
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_measure, name, wanted) for name, wanted in missing.items()]
        try:
            for done in as_completed(waiting):
                for row in done.result():
                    resumed.add(row)
                    yield row
        finally:
            pool.shutdown(cancel_futures=True)


def _measure(name: str, recipes: Sequence[str]) -> list[Outcome]:
    """One architecture. A process that dies is started again for the recipes after the one it died of."""
    left, rows = list(recipes), list[Outcome]()
    while left:
        status, output, errors = _python("measure", name, *left)
        fp32: dict[str, Any] = {"parameters": 0, "fp32": ()}
        for line in output.splitlines():
            record = json.loads(line)
            if "recipe" not in record:
                fp32 = record
                continue
            rows.append(_outcome(name, record["recipe"], fp32, record))
            left.remove(record["recipe"])
        if left:
            record = {"error": _last_words(status, errors)}
            doomed = left if not fp32["fp32"] else left[:1]  # nothing will run where FP32 does not
            rows += [_outcome(name, recipe, fp32, record) for recipe in doomed]
            left = left[len(doomed) :]
    return rows


def _outcome(name: str, recipe: str, fp32: dict[str, Any], switched: dict[str, Any]) -> Outcome:
    architecture = ARCHITECTURES[name]
    error, launched, same = switched.get("error", ""), math.nan, False
    if fp32["fp32"]:
        status, output, errors = _launch(name, recipe)
        if status == 0:
            record = json.loads(output.splitlines()[-1])
            launched = record["after"]
            same = all(record[key] == switched.get(key) for key in ("steps", "after"))
        else:
            error = error or f"halfstep run: {_last_words(status, errors)}"
    return Outcome(
        architecture=name,
        kind=architecture.kind.value,
        model=f"{architecture.library}.{architecture.model}",
        recipe=recipe,
        parameters=fp32["parameters"],
        cosine=switched.get("cosine", math.nan),
        after=switched.get("after", math.nan),
        fp32=tuple(switched.get("fp32", fp32["fp32"])),
        launched=launched,
        same=same,
        skipped=switched.get("skipped", 0),
        seconds=switched.get("seconds", 0.0),
        error=error,
    )


def _launch(name: str, recipe: str) -> tuple[int, str, str]:
    options = ("--recipe", recipe, "--quiet", "-m", f"{_MODULES}.program", name)
    return _finish([sys.executable, "-m", "halfstep", "run", *options])


def _python(module: str, *arguments: str) -> tuple[int, str, str]:
    return _finish([sys.executable, "-m", f"{_MODULES}.{module}", *arguments])


def _finish(command: Sequence[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return 1, output, f"stopped after {_LIMIT} seconds"
    return done.returncode, done.stdout, done.stderr


def _last_words(status: int, errors: str) -> str:
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process left with status {status}"
