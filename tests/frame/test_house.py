"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "halfstep").rglob("*.py"))
NATIVE = sorted((ROOT / "src" / "halfstep" / "_core").glob("*.[ch]pp"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
HARD_LIMIT = 500


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def findings(tree: ast.AST, *, may_read_environment: bool) -> Iterator[str]:
    """What breaks a rule, as ``line: rule``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"{node.lineno}: assert is for tests"
        if (
            isinstance(node, ast.Attribute)
            and not may_read_environment
            and ast.unparse(node) in {"os.environ", "os.getenv"}
        ):
            yield f"{node.lineno}: no environment variable below the command line"
        if isinstance(node, ast.ClassDef):
            for decorator in node.decorator_list:
                text = ast.unparse(decorator)
                # What others see is frozen; a private tally may count.
                private = node.name.startswith("_")
                wanted = ("slots=True", "kw_only=True", *(() if private else ("frozen=True",)))
                if text.startswith("dataclass") and not all(word in text for word in wanted):
                    yield f"{node.lineno}: {node.name} is a dataclass without {', '.join(wanted)}"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_source_keeps_the_rules(path: Path):
    tree = ast.parse(path.read_text())
    assert list(findings(tree, may_read_environment="cli" in path.parts)) == []


@pytest.mark.parametrize("path", [*SOURCES, *NATIVE, *TESTS], ids=ids)
def test_file_is_short_enough(path: Path):
    assert len(path.read_text().splitlines()) <= HARD_LIMIT


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_file_name_says_what_is_inside(path: Path):
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}
    folder = path.parent.name
    assert folder == "halfstep" or not path.stem.startswith(f"{folder}_")


def test_the_rules_can_be_broken():
    bad = "import os\n@dataclass\nclass A:\n    x: int\nassert os.environ['A']\n"
    found = list(findings(ast.parse(bad), may_read_environment=False))
    assert [line.partition(": ")[2].split()[0] for line in found] == ["A", "assert", "no"]
