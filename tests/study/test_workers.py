"""Workers do their jobs, tell how far they are, survive each other, and end when told."""

from __future__ import annotations

import os
import time

import pytest

from halfstep.study.workers import Died, Done, Progressed, Raised, Started, Workers


def work(job: str, tell) -> str:
    tell(0.5, 7.0)
    if job == "raise":
        raise ValueError("as asked")
    if job == "die":
        os._exit(3)
    if job == "sleep":
        time.sleep(60)
    return job.upper()


def test_every_job_ends_somehow_and_the_others_go_on():
    jobs = ["a", "raise", "die", "b"]
    with Workers(2, work) as pool:
        events = list(pool.run(jobs))
    ends = {event.job: event for event in events if not isinstance(event, Started | Progressed)}
    assert [ends[0].result, ends[3].result] == ["A", "B"]
    assert isinstance(ends[1], Raised)
    assert ends[1].message == "ValueError: as asked"
    assert "as asked" in ends[1].trace
    assert ends[2] == Died(job=2, exit_code=3)
    assert [event.job for event in events if isinstance(event, Started)] == [0, 1, 2, 3]
    assert Progressed(job=0, share=0.5, figure=7.0) in events
    assert sum(isinstance(event, Done) for event in events) == 2


def test_leaving_ends_the_processes_at_once():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(1, work) as pool:
        for event in pool.run(["sleep"]):
            if isinstance(event, Progressed):
                processes = [process for _, process in pool._busy.values()]
                raise KeyboardInterrupt
    assert time.monotonic() - started < 30
    assert not any(process.is_alive() for process in processes)
