"""One version: the package's, its metadata's, the changelog's."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import halfstep

ROOT = Path(__file__).parents[2]


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    latest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest
    assert (
        halfstep.__version__
        == importlib.metadata.version("halfstep")
        == project["version"]
        == latest.group(1)
    )
