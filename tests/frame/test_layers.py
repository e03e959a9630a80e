"""The layers: errors <- format <- ops <- recipe <- switching <- diagnosis <- study <- cli."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert command, "import-linter is part of the dev extra"
    return subprocess.run(
        [command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_imports_go_one_way():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout
    assert "one way KEPT" in result.stdout
    assert "data stays light KEPT" in result.stdout


def test_the_contract_can_fail(tmp_path: Path):
    package = tmp_path / "tower"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "low.py").write_text("import tower.high\n")
    (package / "high.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_packages = ["tower"]\n'
        '[[tool.importlinter.contracts]]\nname = "one way"\ntype = "layers"\n'
        'layers = ["tower.high", "tower.low"]\n'
    )
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "one way BROKEN" in result.stdout
