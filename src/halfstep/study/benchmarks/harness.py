"""How things are timed, compared and written down; what is timed is the business of others."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch

import halfstep
from halfstep.study.provenance import processor

__all__ = [
    "Clock",
    "Machine",
    "Ratio",
    "Row",
    "Sense",
    "Target",
    "interleave",
    "ratio",
    "save",
    "this_machine",
    "write_record",
]


class Clock(Enum):
    """Which time is read."""

    WALL = "wall"
    """What a user waits."""
    CPU = "cpu"
    """What the process computed, on one thread: for a machine that others keep busy."""

    def read(self) -> float:
        """Seconds since some fixed moment."""
        return time.perf_counter() if self is Clock.WALL else time.process_time()


class Sense(Enum):
    """Which side of a target is good."""

    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound that a figure must keep."""

    sense: Sense
    bound: float

    def met_by(self, figure: float) -> bool:
        """Whether the figure keeps the bound; a NaN keeps none."""
        if self.sense is Sense.AT_MOST:
            return figure <= self.bound
        return figure >= self.bound

    def __str__(self) -> str:
        return f"{self.sense.value} {self.bound:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio of two times: median and quartiles over the rounds that have both."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a performance table: a case against another, the figure beside its target."""

    case: str
    against: str
    figure: Ratio
    target: Target
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def met(self) -> bool:
        """Whether the median keeps the target."""
        return self.target.met_by(self.figure.median)

    def as_dict(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return {
            "case": self.case,
            "against": self.against,
            "figure": self.figure.median,
            "quartiles": [self.figure.low, self.figure.high],
            "rounds": self.figure.rounds,
            "target": str(self.target),
            "met": self.met,
            "details": dict(self.details),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where figures were taken: enough to judge them, nothing that names the host."""

    processor: str
    cores: int
    threads: int
    clock: str
    memory_gib: int
    device: str
    python: str
    torch: str
    halfstep: str
    load: float

    def as_dict(self) -> dict[str, Any]:
        """The description as plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


def interleave(
    contestants: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    warmup: int = 2,
    limits: Mapping[str, int] | None = None,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = Clock.WALL.read,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, all taking turns so that noise falls on all alike.

    The order rotates from round to round. ``limits`` gives slow contestants fewer rounds and no
    warm-up. ``synchronize`` is called before each reading of the clock.
    """
    limits = limits or {}
    for name, run in contestants.items():
        for _ in range(0 if name in limits else warmup):
            run()
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if index >= limits.get(name, rounds):
                continue
            synchronize()
            start = clock()
            contestants[name]()
            synchronize()
            seconds[name].append(clock() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The quotient round by round, as its median and quartiles."""
    quotients = [a / b for a, b in zip(numerator, denominator, strict=False)]
    if not quotients:
        return Ratio(median=math.nan, low=math.nan, high=math.nan, rounds=0)
    if len(quotients) == 1:
        low = high = quotients[0]
    else:
        low, _, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return Ratio(median=statistics.median(quotients), low=low, high=high, rounds=len(quotients))


def this_machine(device: str, clock: Clock = Clock.WALL) -> Machine:
    """The machine this process runs on, and how time was taken."""
    cuda = torch.device(device).type == "cuda"
    return Machine(
        processor=processor(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        clock=clock.value,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        python=platform.python_version(),
        torch=torch.__version__,
        halfstep=halfstep.__version__,
        load=round(os.getloadavg()[0], 1),
    )


def save(
    rows: Iterable[Row], machine: Machine, *, theme: str, command: str, directory: Path
) -> tuple[Path, Path]:
    """Writes ``<theme>_<machine>_<date>.json`` and ``.md``, command included; returns the paths."""
    dicts = [row.as_dict() for row in rows]
    return write_record(
        dicts, machine, theme=theme, command=command, directory=directory, page=_lines(dicts)
    )


def write_record(
    rows: Sequence[Mapping[str, Any]],
    machine: Machine,
    *,
    theme: str,
    command: str,
    directory: Path,
    page: Sequence[str],
) -> tuple[Path, Path]:
    """As `save`, for rows of any kind: ``page`` are the lines that show them to a reader."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    where = machine.device if machine.device != "cpu" else machine.processor
    stem = f"{theme}_{_slug(where)}_{today}"
    directory.mkdir(parents=True, exist_ok=True)
    data, text = directory / f"{stem}.json", directory / f"{stem}.md"
    record = {"theme": theme, "date": today, "command": command, "machine": machine.as_dict()}
    data.write_text(json.dumps({**record, "rows": list(rows)}, indent=2) + "\n")
    described = ", ".join(f"{key} {value}" for key, value in machine.as_dict().items())
    head = [f"# {theme}, {today}", "", f"Command: `{command}`", "", f"Machine: {described}", ""]
    text.write_text("\n".join([*head, *page]) + "\n")
    return data, text


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "Figures are medians over rounds in which all contestants take turns; quartiles beside.",
        "",
        "| case | against | figure | quartiles | target | met |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        met = "yes" if row["met"] else "no"
        lines.append(
            f"| {row['case']} | {row['against']} | {row['figure']:.2f} | {low:.2f}-{high:.2f} "
            f"| {row['target']} | {met} |"
        )
    return lines


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
