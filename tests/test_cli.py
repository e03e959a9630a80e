"""The command line: help with an example, tables, JSON, statuses, errors."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import get_args

import pytest

import halfstep
from halfstep import cli
from halfstep.cli import bench
from halfstep.cli import demo as cli_demo
from halfstep.format import formats
from halfstep.recipe import policies, recipes
from halfstep.study import demo
from halfstep.study.benchmarks import arithmetic
from halfstep.study.benchmarks import switch as switch_benchmark
from halfstep.study.benchmarks.groups import Group
from halfstep.study.benchmarks.harness import Clock, Ratio, Row, Sense, Target

COMMANDS = [
    ["demo"],
    ["run"],
    ["formats"],
    ["recipes"],
    ["bench", "switch"],
    ["bench", "arithmetic"],
    ["bench", "architectures"],
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs ``halfstep ARGUMENTS``; returns status, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halfstep", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return call


def row(median: float) -> Row:
    return Row(
        case="halfstep bf16 step, CNN",
        against="autocast bf16, time ratio",
        figure=Ratio(median=median, low=median, high=median, rounds=3),
        target=Target(sense=Sense.AT_MOST, bound=1.0),
    )


def test_version(run):
    assert run("--version") == (0, f"halfstep {halfstep.__version__}\n", "")


def test_no_command_explains(run):
    _, out, err = run()
    assert all(command in out + err for command in ("formats", "recipes", "bench"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example_and_json(run, command: list[str]):
    status, out, _ = run(*command, "--help")
    assert status == 0
    assert f"Example: halfstep {' '.join(command)}" in out
    assert "--json" in out


def test_formats_table_and_json_have_the_whole_catalogue(run):
    status, table, _ = run("formats")
    assert status == 0
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(formats())
    status, text, _ = run("formats", "--json")
    assert [record["name"] for record in json.loads(text)] == list(formats())


def test_one_format(run):
    _, out, _ = run("formats", "fp16")
    assert "65504" in out
    record = json.loads(run("formats", "e6m9", "--json")[1])
    assert (record["exponent"], record["mantissa"], record["max"]) == (6, 9, 4290772992.0)


def test_a_limit_that_does_not_exist_is_null_in_json(run):
    assert math.isnan(formats()["int8"].smallest_normal)
    record = json.loads(run("formats", "int8", "--json")[1])
    assert record["smallest normal"] is None


def test_an_op_policy_is_printed_edited_and_read_back(run, tmp_path):
    _, table, _ = run("recipes", "--policy", "amp")
    assert all(op in table for op, _ in policies()["amp"].classes)
    record = json.loads(run("recipes", "--policy", "amp", "--json")[1])
    record["classes"]["fp32"].remove("softplus")
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(record))
    _, table, _ = run("recipes", "--policy", str(path))
    assert "policy=amp/softplus-own" in table
    assert run("recipes", "--policy", str(tmp_path / "absent.json"))[0] == 2
    assert run("recipes", "fp16", "--policy", "amp")[0] == 2


def test_recipes_table_and_json_have_the_whole_catalogue(run):
    _, table, _ = run("recipes")
    assert all(name in table for name in recipes())
    _, text, _ = run("recipes", "--json")
    assert [record["name"] for record in json.loads(text)] == list(recipes())


def test_one_recipe_and_a_variant(run):
    record = json.loads(run("recipes", "16-mixed", "--json")[1])
    assert record["name"] == "fp16"
    assert record["loss scaling"]["initial"] == 65536.0
    _, out, _ = run("recipes", "fp16:accumulate=fp16")
    assert "fp16:accumulate=fp16" in out
    assert "1710.03740" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "fp61"], "halfstep: unknown recipe 'fp61'; did you mean fp16"),
        (["recipes", "fp16:acc=fp16"], "halfstep: unknown key 'acc' in 'fp16:acc=fp16'"),
        (["formats", "fp61"], "halfstep: unknown format 'fp61'; did you mean fp16"),
        (["formats", "e9m9"], "halfstep: "),
        (["formatz"], "No such command 'formatz'"),
        (["bench", "switch", "--rounds", "0"], "Invalid value for '--rounds'"),
        (["bench", "arithmetic", "--only", "all"], "Invalid value for '--only'"),
    ],
)
def test_misuse_is_status_2_and_says_what(run, arguments: list[str], message: str):
    status, out, err = run(*arguments)
    assert status == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(("median", "status"), [(0.98, 0), (1.07, 1)])
def test_bench_prints_figure_beside_target_and_answers_by_status(
    run, monkeypatch: pytest.MonkeyPatch, median: float, status: int
):
    monkeypatch.setattr(switch_benchmark, "rows", lambda **_: iter([row(0.9), row(median)]))
    left, out, _ = run("bench", "switch")
    assert left == status
    header, first, second = out.splitlines()
    assert header.split() == ["case", "against", "figure", "quartiles", "target", "met"]
    assert first.split()[-5:] == ["0.90", "0.90-0.90", "<=", "1.00", "yes"]
    assert second.split()[-1] == ("yes" if status == 0 else "no")


def test_bench_json_and_record(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(switch_benchmark, "rows", lambda **_: iter([row(0.9)]))
    status, out, err = run("bench", "switch", "--json", "--save", str(tmp_path))
    assert status == 0
    assert json.loads(out)["rows"][0]["met"] is True
    assert json.loads(out)["machine"]["torch"]
    written = sorted(path.suffix for path in tmp_path.iterdir())
    assert written == [".json", ".md"]
    assert err.count("written: ") == 2
    (page,) = tmp_path.glob("*.md")
    assert f"`halfstep bench switch --json --save {tmp_path}`" in page.read_text()


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [(bench.ClockName, Clock), (cli_demo.TaskName, demo.TaskChoice)],
)
def test_choices_spelled_out_are_the_enumerations(spelled: object, meant: type[Enum]):
    assert list(get_args(get_args(spelled)[0])) == [member.value for member in meant]


def test_demo_hands_its_options_on_and_its_status_back(run, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, object] = {}

    def perform(output: Path, **options: object) -> int:
        given.update(output=output, **options)
        return 1

    monkeypatch.setattr(demo, "demo", perform)
    assert run("demo")[0] == 1
    assert given == {
        "output": Path("report.html"),
        "quick": False,
        "task": demo.TaskChoice.AUTO,
        "seeds": demo.FULL.seeds,
        "write_json": False,
    }
    run("demo", "--output", "a.html", "--quick", "--task", "handwriting", "--json")
    assert (given["output"], given["quick"], given["write_json"]) == (Path("a.html"), True, True)
    assert given["task"] is demo.TaskChoice.HANDWRITING


def test_interrupt_is_status_130(run, monkeypatch: pytest.MonkeyPatch):
    def rows(**_: object):
        yield row(0.9)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(switch_benchmark, "rows", rows)
    status, out, err = run("bench", "switch")
    assert status == 130
    assert "CNN" in out, "what was measured before is kept"
    assert "Traceback" not in err


def test_demo_without_its_extra_says_what_to_install(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "halfstep.study.demo", None)  # importing it fails
    status, _, err = run("demo")
    assert status == 2
    assert err.startswith("halfstep: the demo needs halfstep.study.demo, which is not installed: ")
    assert err.endswith("pip install 'halfstep[study]'\n")


def test_installed_command():
    program = Path(sys.executable).parent / "halfstep"
    result = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"halfstep {halfstep.__version__}\n"


def test_bench_arithmetic_measures_the_parts_asked_for(run, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, object] = {}

    def rows(**options: object):
        given.update(options)
        return iter([row(0.9)])

    monkeypatch.setattr(arithmetic, "rows", rows)
    run("bench", "arithmetic", "--only", "matmul", "--only", "memory", "--rounds", "3")
    assert given["only"] == [Group.MATMUL, Group.MEMORY]
    assert (given["rounds"], given["clock"]) == (3, Clock.WALL)
    run("bench", "arithmetic")
    assert given["only"] == list(Group)
