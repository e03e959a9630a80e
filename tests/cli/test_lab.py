"""``halfstep lab``: tables, JSON, pages, statuses, errors; experiments are real where they are quick."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from halfstep import cli
from halfstep.cli import lab
from halfstep.study.lab import catalogue
from halfstep.study.lab.catalogue import EXPERIMENTS
from halfstep.study.lab.formats import formats

COMMANDS = [*EXPERIMENTS, "all"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs ``halfstep lab ARGUMENTS``; returns status, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halfstep", "lab", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def only_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickest experiment stands for all of them."""
    monkeypatch.setattr(catalogue, "EXPERIMENTS", dict.fromkeys(EXPERIMENTS, formats))


def test_every_experiment_has_a_command():
    assert list(get_command(lab.group).commands) == COMMANDS  # pyright: ignore


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_options(run, command: str):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"Example: halfstep lab {command}" in out
    assert all(option in out for option in ("--json", "--seed", "--output"))


@pytest.mark.parametrize("command", list(EXPERIMENTS))
def test_a_command_runs_its_own_experiment(run, monkeypatch: pytest.MonkeyPatch, command: str):
    seeds: list[int] = []

    def perform(seed: int):
        seeds.append(seed)
        return formats(seed)

    monkeypatch.setattr(catalogue, "EXPERIMENTS", {command: perform})
    assert run(command, "--seed", "5", "--json")[0] == 0
    assert seeds == [5]


def test_table_has_published_and_ours_and_where_from(run):
    status, out, _ = run("formats")
    assert status == 0
    (line,) = (line for line in out.splitlines() if "e4m3fn: largest number" in line)
    assert line.split()[-5:] == ["448", "448", "448", "yes", "2"]
    assert "2: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433" in out


def test_json_has_findings_and_curves(run):
    status, out, err = run("formats", "--seed", "2", "--json")
    record = json.loads(out)
    assert (status, err) == (0, "")
    assert (record["name"], record["seed"], record["reproduced"]) == ("formats", 2, True)
    assert record["findings"][0]["published"] == "40"
    assert {panel["name"] for panel in record["panels"]} == {"reach", "spacing", "number-lines"}


def test_a_finding_that_is_not_reproduced_is_status_1(run, monkeypatch: pytest.MonkeyPatch):
    from halfstep.study.lab import formats as module

    monkeypatch.setattr(module, "_TINY", 1e-4)  # what is asked for as the smallest number is not
    status, out, _ = run("formats")
    assert status == 1
    (line,) = (line for line in out.splitlines() if "e5m2: smallest number" in line)
    assert line.split()[-2] == "no"


@pytest.mark.usefixtures("only_formats")
def test_all_writes_one_page_and_prints_a_list(run, tmp_path: Path):
    folder = tmp_path / "new" / "lab"
    status, out, err = run("all", "--output", str(folder), "--json")
    assert status == 0
    assert len(json.loads(out)) == len(EXPERIMENTS)
    assert [path.name for path in folder.iterdir()] == ["lab.html"]
    assert f"The page: {folder / 'lab.html'}" in err
    page = (folder / "lab.html").read_text()
    assert page.count("<section>") == len(EXPERIMENTS)
    assert f"Made by: halfstep lab all --output {folder} --json, in " in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sums",), "No such command 'sums'"),
        (("formats", "--seed", "-1"), "Invalid value for '--seed'"),
        (("formats", "--seed", "one"), "Invalid value for '--seed'"),
        (("formats", "--output", "{folder}"), "the page cannot be written to {folder}; give"),
        (("formats", "--output", "{file}/a.html"), "the folder of {file}/a.html cannot be made"),
        (("all", "--output", "{file}"), "--output {file} is a file; give the name of a folder"),
    ],
)
@pytest.mark.usefixtures("only_formats")
def test_misuse_is_status_2_says_what_and_computes_nothing(
    run, tmp_path: Path, arguments: tuple[str, ...], message: str
):
    file = tmp_path / "a.txt"
    file.touch()
    places = {"folder": str(tmp_path), "file": str(file)}
    status, out, err = run(*(argument.format(**places) for argument in arguments))
    assert status == 2
    assert message.format(**places) in err
    assert out == ""


def test_a_page_without_its_extra_says_what_to_install(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, "plotly", None)  # importing it fails
    status, out, err = run("formats", "--output", str(tmp_path / "a.html"))
    assert (status, out) == (2, "")
    assert "--output needs plotly, which is not installed: pip install 'halfstep[report]'" in err
