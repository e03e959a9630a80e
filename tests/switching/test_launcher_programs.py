"""A program that is launched behaves as under python: output, status, traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
HALFSTEP = str(Path(sys.executable).with_name("halfstep"))
PYTHON = Path(HALFSTEP).read_text().splitlines()[0].removeprefix("#!")  # by that very name
# The switch's own status, for a program that succeeds and trains nothing.
NOTHING_SWITCHED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    status: int
    out: str
    err: str


def started(*command, cwd=SCRIPTS, stdin="Ada\nrest", environment=None) -> Ended:
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})},
    )
    return Ended(status=done.returncode, out=done.stdout, err=done.stderr)


def both(*program, **kwargs) -> tuple[Ended, Ended]:
    """The program by python, and by halfstep without a summary."""
    return (
        started(PYTHON, *program, **kwargs),
        started(HALFSTEP, "run", "--quiet", *program, **kwargs),
    )


PROGRAMS = {
    "itself": ("itself.py", "a", "-b", "--recipe", "c", "--help"),
    "number": ("leaving.py", "number"),
    "text": ("leaving.py", "text"),
    "none": ("leaving.py", "none"),
    "zero": ("leaving.py", "zero"),
    "interrupt": ("leaving.py", "interrupt"),
    "raise": ("leaving.py", "raise"),
    "hook": ("leaving.py", "hook"),
    "abrupt": ("leaving.py", "abrupt"),
    "thread": ("leaving.py", "thread"),
    "fork": ("leaving.py", "fork"),
    "package": ("-m", "package", "-m", "x"),
    "module": ("-m", "package.inner.module", "--flag"),
    "no module": ("-m", "package.missing"),
    "folder": ("folder", "argument"),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_as_under_python(program):
    plain, launched = both(*program)
    assert launched.out == plain.out
    assert launched.err == plain.err
    assert launched.status == (plain.status or NOTHING_SWITCHED)


def test_these_programs_are_what_they_seem():
    """The comparison above would hold for programs that fail at once, too."""
    itself = started(sys.executable, *PROGRAMS["itself"])
    assert "Ada" in itself.out
    assert "ExceptionGroup: two" in itself.err
    assert started(sys.executable, *PROGRAMS["interrupt"]).status == -2


def test_as_a_module_of_python(tmp_path):
    """``python -m halfstep``, from another folder, with a script that is a link."""
    (tmp_path / "link.py").symlink_to(SCRIPTS / "itself.py")
    plain = started(sys.executable, "link.py", cwd=tmp_path)
    launched = started(sys.executable, "-m", "halfstep", "run", "--quiet", "link.py", cwd=tmp_path)
    assert (
        plain.out.count(str(tmp_path)) == 2
    )  # __file__ and the loader's; the path is the real one
    assert launched == plain


def test_a_script_that_is_no_python(tmp_path):
    (tmp_path / "invalid.py").write_text("x = (1,\n")
    plain, launched = both("invalid.py", cwd=tmp_path)
    assert "was never closed" in plain.err
    assert launched == plain


def test_an_archive(tmp_path):
    archive = shutil.make_archive(str(tmp_path / "program"), "zip", SCRIPTS / "folder")
    plain, launched = both(archive, "x")
    assert "beside" in plain.out
    assert (launched.out, launched.err) == (plain.out, plain.err)


def test_processes_start_in_the_programs_main_and_without_halfstep():
    plain, launched = both("processes.py")
    assert launched.out == plain.out
    assert launched.out.count("False __mp_main__") == 2
    assert launched.err == plain.err == ""


def test_a_program_without_torch_does_not_load_it():
    ended = started(HALFSTEP, "run", "leaving.py", "zero")
    assert ended.err == "halfstep: nothing was switched: no torch was imported\n"
    assert ended.status == NOTHING_SWITCHED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "there is no file missing.py; give a script, or -m and a module"),
        (
            ["--recipe", "fp61", "leaving.py"],
            "unknown recipe 'fp61'; did you mean fp16 or mxfp6 or fp8?",
        ),
        (
            ["--report", "no/such/page.html", "leaving.py"],
            "no/such/page.html cannot be written; give the name of a file in a folder that is there",
        ),
    ],
    ids=["script", "recipe", "report"],
)
def test_misuse(arguments, message):
    ended = started(HALFSTEP, "run", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == f"halfstep: {message}\n"


def without_summary(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("halfstep: "))


def check_training(plain: Ended, launched: Ended) -> None:
    assert (launched.out, launched.status) == (plain.out, plain.status)
    assert without_summary(launched.err) == plain.err
    assert plain.out.startswith("right 64 of 64")


def test_a_training_script(tmp_path):
    page, record = tmp_path / "report.html", tmp_path / "run.json"
    options = ("--fail", "forward")
    plain = started(PYTHON, "training.py", *options)
    launched = started(HALFSTEP, "run", "--report", page, "--json", record, "training.py", *options)
    check_training(plain, launched)
    assert plain.err.splitlines()[-1].startswith("RuntimeError: mat1 and mat2 shapes")
    summary = launched.err.splitlines()[-3:]
    assert summary[0].startswith(
        "halfstep: recipe fp16, matrix products, convolutions, attention, recurrent layers emulated on cpu"
    )
    assert summary[1:] == [
        "halfstep: Net, AdamW: 12 steps, none skipped; loss scale 65536",
        "halfstep: 12 backward passes",
    ]
    run = json.loads(record.read_text())
    assert (run["recipe"], run["backwards"], run["autocast"], run["grad_scaler"]) == (
        "fp16",
        12,
        False,
        False,
    )
    assert run["models"][0]["steps"] == 12
    assert run["models"][0]["scales"] == [[1, 65536.0]]
    assert run["explanations"][0]["rows"][0]["executor"] == "emulated"
    text = page.read_text()
    assert "training.py --fail forward in fp16" in text
    assert "12 steps, none skipped" in text


def test_a_training_script_emulated(tmp_path):
    page, record = tmp_path / "report.html", tmp_path / "run.json"
    options = ("--fail", "forward")
    plain = started(PYTHON, "training.py", *options)
    how = ("--emulate", "--recipe", "fp16", "--report", page, "--json", record)
    emulated = started(HALFSTEP, "run", *how, "training.py", *options)
    check_training(plain, emulated)
    first, *_, last = [line for line in emulated.err.splitlines() if line.startswith("halfstep: ")]
    assert first.startswith("halfstep: recipe fp16: ") and first.endswith(" operations emulated")
    assert last == "halfstep: 12 steps, 0 skipped, loss scale 65536"
    run = json.loads(record.read_text())
    assert (run["steps"], run["loss_scales"], run["unknown"]) == (12, [65536.0, 65536.0], [])
    assert sum(run["operations"]["dot"].values()) > 12
    text = page.read_text()
    assert "training.py --fail forward in fp16" in text and "12 steps, 0 skipped" in text


def test_emulate_runs_what_no_model_is_made_of(tmp_path):
    (tmp_path / "functions.py").write_text(
        "import sys, atexit, torch\natexit.register(lambda: print(torch.ones(1).item()))\n"
        "x = torch.full((1,), 2048.0)\nprint((x + 1).item())\nsys.exit(int(sys.argv[1]))\n"
    )
    how = ("run", "--emulate", "--recipe", "fp16-naive", "functions.py")
    ended = started(HALFSTEP, *how, "0", cwd=tmp_path)
    assert (ended.status, ended.out) == (0, "2048.0\n1.0\n")
    assert started(HALFSTEP, *how, "3", cwd=tmp_path).status == 3
    (tmp_path / "idle.py").write_text("import torch\n")
    ended = started(HALFSTEP, "run", "--emulate", "idle.py", cwd=tmp_path)
    assert (ended.status, ended.out) == (1, "")
    refused = ("run", "--emulate", "--recipe", "nvfp4", "idle.py")
    ended = started(HALFSTEP, *refused, cwd=tmp_path)
    assert ended.status == 2 and "emulate sees operations and no modules" in ended.err


def test_a_script_that_trains_nothing_leaves_with_status_1(tmp_path):
    (tmp_path / "idle.py").write_text("import torch\nprint(torch.ones(1).item())\n")
    ended = started(HALFSTEP, "run", "idle.py", cwd=tmp_path)
    assert (ended.status, ended.out) == (1, "1.0\n")
    assert ended.err.startswith("halfstep: nothing was switched: no torch.nn.Module was called")


def test_a_recipe_that_has_no_executor_is_refused_as_torch_is_imported(tmp_path):
    (tmp_path / "idle.py").write_text("import torch\nprint('not reached')\n")
    ended = started(HALFSTEP, "run", "--recipe", "fp16:store=e5m2", "idle.py", cwd=tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("halfstep: recipe fp16:store=e5m2: store=e5m2 has no executor")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("fp32", ()),
        ("bf16", ("--fail", "status")),
        ("fp16", ("--start", "spawn")),
        ("fp16", ("--fail", "backward")),
    ],
)
def test_training_in_every_recipe(recipe, options):
    plain = started(PYTHON, "training.py", *options)
    launched = started(HALFSTEP, "run", "--recipe", recipe, "training.py", *options)
    check_training(plain, launched)
    assert "Net, AdamW: 12 steps, none skipped" in launched.err


AUDITED = """
import sys, torch

def train(breaks):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    for k in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        if breaks:
            model[2].weight.data = model[2].weight.data.half()
            return model

kept = train(sys.argv[1] == "breaks")  # without a breach the model is gone here
"""


def test_audit_shows_how_everything_was_held_and_fails_where_a_promise_is_broken(tmp_path):
    (tmp_path / "train.py").write_text(AUDITED)
    how = (HALFSTEP, "run", "--recipe", "bf16", "--audit", "--json", "run.json", "train.py")
    healthy = started(*how, "whole", cwd=tmp_path)
    assert healthy.status == 0
    assert "halfstep: audit of Sequential\nhalfstep: recipe bf16 on cpu, AdamW, " in healthy.err
    assert "every promise of the recipe is kept" in healthy.err
    (model,) = json.loads((tmp_path / "run.json").read_text())["models"]
    rows = model["audits"][0]["rows"]
    assert [row["parameter"] for row in rows] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert {row["state"]["exp_avg"]["format"] for row in rows} == {"fp32"}
    assert {row["working"]["format"] for row in rows} == {"bf16"}
    broken = started(*how, "breaks", cwd=tmp_path)
    assert broken.status == 1
    assert "BROKEN: weight of 2.weight is fp16" in broken.err
    (model,) = json.loads((tmp_path / "run.json").read_text())["models"]
    assert next(it["what"] for it in model["audits"][0]["broken"]) == "weight of 2.weight"
    refused = started(HALFSTEP, "run", "--emulate", "--audit", "train.py", "whole", cwd=tmp_path)
    assert refused.status == 2
    assert "--audit looks at switched models" in refused.err


def test_audit_says_which_models_it_did_not_see(tmp_path):
    (tmp_path / "train.py").write_text(
        "import gc, torch\n"
        "def once():\n"
        "    model = torch.nn.Linear(4, 1)\n"
        "    model(torch.ones(2, 4)).sum().backward()\n"
        "once()\n"
        "gc.collect()\n"
    )
    ended = started(HALFSTEP, "run", "--audit", "train.py", cwd=tmp_path)
    assert "no audit of Linear: it was gone before a step was applied" in ended.err
