"""Where figures come from: the command, the machine and the versions, in lines for a reader."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
from pathlib import Path

import torch

import halfstep

__all__ = ["command", "made_by", "processor"]


def made_by(seconds: float) -> tuple[str, str]:
    """Two lines: the command, how long it took and when; processor, system and versions."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    when = f"{datetime.datetime.now().astimezone():%d %B %Y, %H:%M %Z}"
    took = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
    system = f"{platform.system()} {platform.machine()}"
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"halfstep {halfstep.__version__}"
    )
    return (
        f"Made by: {command()}, in {took}, {when}.",
        f"{processor()}, {threads} threads; {system}; {versions}.",
    )


def command() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def processor() -> str:
    """The processor's name; of one that does not say, its architecture."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()
