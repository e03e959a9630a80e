"""A few processes that do jobs side by side and end when told to.

Beside ``concurrent.futures`` for three things: a job tells how far it is, a worker that dies costs
its own job only, and stopping half-way ends the processes at once.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

__all__ = ["Died", "Done", "Progressed", "Raised", "Started", "Workers"]

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Job number ``job`` began."""

    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """Job number ``job`` is ``share`` done (0 to 1); ``figure`` is what it measured last."""

    job: int
    share: float
    figure: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Generic[R]):
    """Job number ``job`` returned ``result``."""

    job: int
    result: R


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """Job number ``job`` raised; ``message`` is the exception in one line, ``trace`` all of it."""

    job: int
    message: str
    trace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The process of job number ``job`` ended with ``exit_code`` before it was done."""

    job: int
    exit_code: int


Event = Started | Progressed | Done[Any] | Raised | Died
Tell = Callable[[float, float], None]


class Workers(Generic[J, R]):
    """``count`` processes, one torch thread each, that call ``work(job, tell)``.

    Use as a context manager; leaving it, by whatever way, ends the processes. ``work`` must be a
    module-level function.
    """

    def __init__(self, count: int, work: Callable[[J, Tell], R]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._count = count
        self._work = work
        self._busy: dict[Connection, tuple[int, Any]] = {}
        self._idle: list[tuple[Connection, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pairs = [*self._idle, *((pipe, process) for pipe, (_, process) in self._busy.items())]
        for pipe, process in pairs:
            process.terminate()
            pipe.close()
        for _, process in pairs:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self._idle.clear()
        self._busy.clear()

    def run(self, jobs: Sequence[J]) -> Iterator[Event]:
        """Do ``jobs``, first ones first, and yield what happens as it happens, until
        all are over.
        """
        waiting = list(enumerate(jobs))
        while waiting or self._busy:
            while waiting and len(self._busy) < self._count:
                number, job = waiting.pop(0)
                pipe, process = self._idle.pop() if self._idle else self._start()
                pipe.send(job)
                self._busy[pipe] = (number, process)
                yield Started(job=number)
            for pipe in wait(list(self._busy)):
                yield self._receive(pipe)  # pyright: ignore[reportArgumentType]

    def _start(self) -> tuple[Connection, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def _receive(self, pipe: Connection) -> Event:
        number, process = self._busy[pipe]
        try:
            kind, *content = pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            del self._busy[pipe]
            pipe.close()
            return Died(job=number, exit_code=process.exitcode)
        if kind == "progress":
            return Progressed(job=number, share=content[0], figure=content[1])
        del self._busy[pipe]
        self._idle.append((pipe, process))
        if kind == "done":
            return Done(job=number, result=content[0])
        return Raised(job=number, message=content[0], trace=content[1])


def _serve(pipe: Connection, work: Callable[[Any, Tell], Any]) -> None:
    """The life of a worker: jobs from ``pipe``, one after another, until it is terminated."""
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    # More threads than cores would wait for each other at every small operation.
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            result = work(job, lambda share, figure: pipe.send(("progress", share, figure)))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            pipe.send(("raised", message, traceback.format_exc()))
        else:
            pipe.send(("done", result))
