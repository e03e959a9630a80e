"""One small demo, and one browser, for all the tests that look at one."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from halfstep.study.demo import TaskChoice, run_demo
from halfstep.study.tasks import Size

SMALL = Size(seeds=1, steps=6, digit_steps=40)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """As in a worker of the demo: threads wait for each other at every small operation."""
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallDemo:
    status: int
    page: Path
    story: dict[str, Any]
    lines: list[dict[str, Any]]
    said: str


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> SmallDemo:
    """Everything the demo does, on handwriting, far too short to learn anything."""
    folder = tmp_path_factory.mktemp("demo")
    said = io.StringIO()
    page = folder / "out" / "report.html"
    status = run_demo(
        page,
        size=SMALL,
        task=TaskChoice.HANDWRITING,
        write_json=True,
        cache=folder / "cache",
        console=Console(file=said, width=160),
    )
    lines = page.with_suffix(".runs.jsonl").read_text().splitlines()
    return SmallDemo(
        status=status,
        page=page,
        story=json.loads(page.with_suffix(".json").read_text()),
        lines=[json.loads(line) for line in lines],
        said=said.getvalue(),
    )


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine; on Debian: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield started
        started.close()
