"""Data are fetched whole, checked, and refused when they are not the ones expected."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from halfstep.errors import DataError
from halfstep.study import datasets
from halfstep.study.datasets import (
    PROMPTS,
    DebianData,
    content_digest,
    fetch_debian,
    mnist_5k,
)

FOLDER = "usr/share/sounds"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DebianData:
    """A data set whose package tools are played by this test; `dpkg-deb -x` copies ``origin``."""
    origin = tmp_path / "origin"
    (origin / FOLDER).mkdir(parents=True)
    (origin / FOLDER / "a.wav").write_bytes(b"sound")
    (origin / "usr/share/other").write_text("not kept")

    def run(command: list[str], folder: Path, data: DebianData) -> None:
        if "download" in command:
            (folder / "sounds.deb").touch()
        if command[0] == "dpkg-deb":
            shutil.copytree(origin, command[-1], dirs_exist_ok=True)

    monkeypatch.setattr(datasets, "_run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return DebianData(
        name="sounds",
        packages=("sounds",),
        folders=(FOLDER,),
        sha256=content_digest(origin, [FOLDER]),
    )


def test_fetched_once_and_whole(archive: DebianData, tmp_path: Path, monkeypatch):
    cache = tmp_path / "cache"
    place = fetch_debian(archive, cache)
    assert (place / FOLDER / "a.wav").read_bytes() == b"sound"
    assert not (place / "usr/share/other").exists()
    assert [path.name for path in cache.iterdir()] == ["sounds"]
    monkeypatch.setattr(datasets, "_run", lambda *_: pytest.fail("fetched twice"))
    assert fetch_debian(archive, cache) == place


def test_other_content_is_refused_and_leaves_nothing(archive: DebianData, tmp_path: Path):
    wrong = dataclasses.replace(archive, sha256="0" * 64)
    with pytest.raises(DataError, match=r"SHA-256 [0-9a-f]{64}, expected 0{64}; the packages of"):
        fetch_debian(wrong, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_noticed(archive: DebianData, tmp_path: Path):
    place = fetch_debian(archive, tmp_path / "cache")
    (place / FOLDER / "a.wav").write_bytes(b"sounD")
    with pytest.raises(DataError, match=r"remove the folder .*sounds and run again"):
        fetch_debian(archive, tmp_path / "cache")


def test_without_apt_the_error_names_the_other_task(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"needs `apt-get`.*--task handwriting"):
        fetch_debian(PROMPTS, tmp_path)


def test_stale_lists_are_refreshed_in_a_private_place(tmp_path: Path, monkeypatch):
    commands: list[list[str]] = []

    def run(command: list[str], folder: Path, data: DebianData) -> None:
        commands.append(command)
        if len(commands) == 1:
            raise DataError("no such package")

    monkeypatch.setattr(datasets, "_run", run)
    datasets._download(PROMPTS, tmp_path)
    assert [command[-1] for command in commands][1] == "update"
    assert f"Dir::State::lists={tmp_path / 'lists'}" in commands[1]
    assert commands[2][-3:] == ["download", *PROMPTS.packages]


def test_a_failing_tool_is_quoted(tmp_path: Path):
    with pytest.raises(DataError, match=r"prompts: `false` failed|`false  ?...` failed"):
        datasets._run(["false"], tmp_path, PROMPTS)


def test_digest_sees_names_and_bytes_only(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name / "d").mkdir(parents=True)
        (tmp_path / name / "d" / "f").write_bytes(b"x")
    one = content_digest(tmp_path / "one", ["d"])
    assert one == content_digest(tmp_path / "two", ["d"])
    (tmp_path / "two" / "d" / "f").rename(tmp_path / "two" / "d" / "g")
    assert one != content_digest(tmp_path / "two", ["d"])


def test_mnist_is_mnist():
    images, labels = mnist_5k()
    assert (images.shape, images.dtype) == ((5000, 28, 28), np.float32)
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert np.bincount(labels).tolist() == [500] * 10
