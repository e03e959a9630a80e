"""The demo from end to end, small: what it writes, what it says, and what Ctrl-C leaves."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from halfstep.errors import DataError, OperandError
from halfstep.study import demo as demo_module
from halfstep.study.demo import TaskChoice, run_demo
from halfstep.study.runs import append_line
from halfstep.study.tasks import Size, Task, jobs_for, perform


def test_every_run_is_in_the_page_and_on_a_line_of_its_own(small_demo):
    assert len(small_demo.lines) == 1 + 3 + 4
    told = small_demo.story["reader"] + small_demo.story["digits"]
    assert sorted(map(str, told)) == sorted(map(str, small_demo.lines))
    assert small_demo.story["missing"] == []
    assert {run["outcome"] for run in told} <= {"finished", "not finite"}


def test_naive_sixteen_bit_stops_at_the_first_update_and_says_why(small_demo):
    (naive,) = (
        run
        for run in small_demo.lines
        if run["experiment"]["variant"] == "naive 16-bit"
        and run["experiment"]["task"] == "handwriting"
    )
    assert (naive["outcome"], naive["steps"]) == ("not finite", 1)
    assert "eps of 1e-08 is 0 in float16" in naive["reason"]
    assert naive["error"] is None
    assert "Adam divided by zero" in small_demo.page.read_text()


def test_the_same_seed_begins_the_same(small_demo):
    losses = {
        (run["experiment"]["variant"], run["experiment"]["seed"]): run["curve"][0]["loss"]
        for run in small_demo.lines
        if run["curve"] and run["experiment"]["task"] == "digits"
    }
    assert losses["FP32", 0] == pytest.approx(losses["mixed precision", 0], rel=1e-3)


def test_bytes_are_those_of_the_recipes(small_demo):
    held = {
        run["experiment"]["variant"]: run["footprint"]
        for run in small_demo.lines
        if run["experiment"]["task"] == "handwriting"
    }
    weights = held["FP32"]["weights"]
    assert held["FP32"]["working"] == 0
    assert held["mixed precision"]["weights"] == weights
    # normalisations stay in FP32 and have no copy
    assert 0.98 * weights / 2 < held["mixed precision"]["working"] < weights / 2
    assert held["naive 16-bit"]["weights"] == weights / 2
    assert held["mixed precision"]["gradients"] == weights


def test_status_and_summary(small_demo):
    assert small_demo.status in (0, 1)
    assert f"The page: {small_demo.page}" in small_demo.said
    assert "handwriting, naive 16-bit, seed 0: not finite at step 1" in small_demo.said


def quietly(output: Path, cache: Path, task: TaskChoice = TaskChoice.HANDWRITING) -> int:
    return run_demo(
        output,
        size=Size(seeds=1, steps=2, digit_steps=2),
        task=task,
        write_json=False,
        cache=cache,
        console=Console(file=io.StringIO()),
    )


def test_interrupted_leaves_a_partial_page(tmp_path: Path, monkeypatch):
    def one_and_no_more(jobs, finished, lines, console):
        finished[0] = perform(jobs[0], lambda share, figure: None)
        append_line(lines, finished[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "perform_all", one_and_no_more)
    output = tmp_path / "report.html"
    assert quietly(output, tmp_path) == 130
    text = output.read_text()
    assert "This report is partial" in text
    assert "Not in it: handwriting, FP32, seed 0." in text
    assert "Adam divided by zero" in text
    assert not list(tmp_path.glob("*.partial"))


def test_without_speech_data_it_reads_handwriting_and_says_so(tmp_path: Path, monkeypatch):
    def load(task: Task, cache: Path):
        if task is Task.SPEECH:
            raise DataError("there is no apt here")
        return original(task, cache)

    original = demo_module.load_corpus
    monkeypatch.setattr(demo_module, "load_corpus", load)
    monkeypatch.setattr(demo_module, "perform_all", lambda *_: None)
    output = tmp_path / "report.html"
    quietly(output, tmp_path, TaskChoice.AUTO)
    assert "Speech is replaced by handwriting" in output.read_text()
    assert "there is no apt here" in output.read_text()
    with pytest.raises(DataError, match="no apt"):
        quietly(output, tmp_path, TaskChoice.SPEECH)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OperandError, match="give the name of a file"):
        quietly(tmp_path, tmp_path)
    with pytest.raises(OperandError, match="cannot be made"):
        quietly(tmp_path / "file" / "report.html", tmp_path)


def test_the_order_of_the_work():
    jobs = jobs_for(Task.SPEECH, Size(seeds=3, steps=1, digit_steps=1), Path())
    assert len(jobs) == 1 + 3 * 2 + 2 + 4 * 3
    assert jobs[0].experiment.recipe == "fp16-naive"
    assert {job.experiment.recipe for job in jobs} == {
        "fp32",
        "fp16",
        "fp16-naive",
        "fp16-nomaster",
    }


@pytest.mark.slow
def test_a_signal_ends_the_workers_and_leaves_a_page(tmp_path: Path):
    output = tmp_path / "report.html"
    code = (
        "import sys; from pathlib import Path; from halfstep.study.demo import *\n"
        "if __name__ == '__main__':\n"
        f"    sys.exit(demo(Path({str(output)!r}), task=TaskChoice.HANDWRITING))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.DEVNULL)
    lines = output.with_suffix(".runs.jsonl")
    deadline = time.monotonic() + 120
    while not lines.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "This report is partial" in output.read_text()
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout
    assert children == ""
