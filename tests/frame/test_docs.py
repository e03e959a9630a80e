"""README and docs: code blocks run, commands exist, tables are current, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[object]:
    return [
        pytest.param(found[2], id=f"{page.relative_to(ROOT)}:{number}")
        for page in PAGES
        for number, found in enumerate(BLOCK.finditer(page.read_text()), 1)
        if found[1] == language
    ]


def commands() -> list[object]:
    lines = {
        line.partition("#")[0].strip()
        for block in blocks("bash")
        for line in block.values[0].splitlines()
    }
    return sorted(lines - {""})


def explained(command: str) -> subprocess.CompletedProcess[str]:
    """What ``--help`` says for the words of the command that name it."""
    program, *words = shlex.split(command)
    names: list[str] = []
    for word in words:
        if not re.fullmatch("[a-z]+", word):
            break
        names.append(word)
    return subprocess.run(
        [BIN / Path(program).name, *names, "--help"], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block_runs_as_pasted(code: str, tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("line", commands())
def test_command_exists(line: str):
    for command in line.split("&&"):
        program, *words = shlex.split(command)
        if program == "make":
            assert {word for word in words if "=" not in word} <= TARGETS
        elif Path(program).name == "halfstep":
            result = explained(command)
            assert result.returncode == 0, result.stderr
        else:
            assert program.startswith(".venv/bin/"), f"nothing checks {command!r}"
            assert (BIN / Path(program).name).exists()


def test_tables_are_current():
    result = subprocess.run(
        [sys.executable, ROOT / "docs" / "tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_make_target_is_explained():
    result = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = {line.split()[0] for line in result.stdout.splitlines()}
    assert {"setup", "demo", "test", "test-all", "lint", "type", "docs", "bench"} <= listed
