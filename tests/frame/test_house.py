"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
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


# What runs what it reads, or reaches beyond the machine.
CODE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
NETWORK = {
    "aiohttp",
    "ftplib",
    "http",
    "httpx",
    "requests",
    "smtplib",
    "socket",
    "urllib",
    "urllib3",
}
RUNS_TEXT = {"__import__", "compile", "eval", "exec"}
# `halfstep run` runs the user's script; that is what it is for.
LAUNCHER = {"cli/program.py": {"compile", "exec"}}


def trust(tree: ast.AST, allowed: Container[str] = ()) -> Iterator[str]:
    """Where a program unpickles, runs text, or opens a connection, as ``line: what``."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in CODE | NETWORK:
                yield f"{node.lineno}: imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in RUNS_TEXT and called not in allowed:
            yield f"{node.lineno}: calls {called}"
        if called == "torch.load" and options.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load without weights_only=True"
        if options.get("allow_pickle") == "True":
            yield f"{node.lineno}: allow_pickle=True"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_nothing_is_unpickled_run_as_text_or_fetched(path: Path):
    allowed = LAUNCHER.get(str(path.relative_to(ROOT / "src" / "halfstep")), set())
    assert list(trust(ast.parse(path.read_text()), allowed)) == []


def test_what_is_not_to_be_trusted_is_found():
    bad = (
        "import pickle\nfrom urllib.request import urlopen\neval('1')\n"
        "torch.load(f)\nnp.load(f, allow_pickle=True)\n"
    )
    found = [line.partition(": ")[2] for line in trust(ast.parse(bad))]
    assert sorted(found) == [
        "allow_pickle=True",
        "calls eval",
        "imports pickle",
        "imports urllib.request",
        "torch.load without weights_only=True",
    ]
    assert list(trust(ast.parse("model.eval()\ntorch.compile(model)\n"))) == []
