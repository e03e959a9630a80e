"""Run another Python program as ``python`` would, in this process. Nothing here imports torch."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import pkgutil
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

import halfstep
from halfstep.errors import HalfstepError

__all__ = ["run_program", "when_loaded"]

_OURS = str(Path(halfstep.__file__).parent) + os.sep
_KERNELS = tuple(
    _OURS + str(Path("switching", name))
    for name in ("overrides.py", "unlisted.py", "emulation/mode.py")
)


def run_program(
    target: str, arguments: Sequence[str], *, is_module: bool, at_end: Callable[[bool], int]
) -> None:
    """``python target arguments``, or ``python -m target arguments``: returns or raises as it ends.

    The program has a ``__main__`` of its own, ``sys.argv`` and ``sys.path[0]`` as Python would set them;
    what is executed is Python's own code (``runpy``). An exception that it does not catch goes on, and its
    traceback is printed without the lines that are ours.

    Args:
        target: a file, a folder or an archive with a ``__main__.py``, or the name of a module.
        arguments: ``sys.argv[1:]`` of the program.
        is_module: ``target`` is a module's name.
        at_end: called once with whether the program failed by itself: after its traceback is printed, before
            its ``atexit`` functions. The status that it returns is left with, where the program succeeded.
    """
    process = os.getpid()

    def end(failed: bool) -> int:
        return at_end(failed) if os.getpid() == process else 0  # a fork that runs to the end too

    try:
        _execute(target, arguments, is_module)
    except SystemExit as leaving:
        failed = leaving.code not in (None, 0)
        status = end(failed)
        if status and not failed:
            sys.exit(status)
        raise
    except BaseException:
        _print_traceback_as_python(then=lambda: end(True))
        raise
    status = end(False)
    if status:
        sys.exit(status)


def _execute(target: str, arguments: Sequence[str], is_module: bool) -> None:
    main = _fresh_main()
    sys.argv = ["-m" if is_module else target, *arguments]
    if is_module:
        _put_first(str(Path.cwd()))
        runpy._run_module_as_main(target)  # pyright: ignore[reportAttributeAccessIssue]
    elif pkgutil.get_importer(target) is not None:
        _put_first(str(Path.cwd() / target))
        runpy._run_module_as_main("__main__", alter_argv=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        path = str(Path.cwd() / target)  # absolute, links in it kept, as Python has it
        _put_first(str(Path(target).resolve().parent))
        main.__file__ = path
        main.__dict__["__cached__"] = None
        main.__loader__ = SourceFileLoader("__main__", path)
        exec(_code(path), main.__dict__)


def _fresh_main() -> types.ModuleType:
    """A new ``__main__``: pickles, spawned processes and ``inspect`` look there for the program."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    if "__annotations__" in vars(sys.modules["__main__"]):  # Python has it there up to 3.13
        main.__annotations__ = {}
    sys.modules["__main__"] = main
    return main


def _put_first(entry: str) -> None:
    """``entry`` for the one that Python put first for us; under -P it puts none."""
    if not sys.flags.safe_path:
        sys.path[0] = entry


def _code(path: str) -> types.CodeType:
    with io.open_code(path) as file:
        compiled: types.CodeType | None = pkgutil.read_code(file)  # pyright: ignore[reportAttributeAccessIssue]
    if compiled is not None:  # a .pyc
        return compiled
    with io.open_code(path) as file:
        return compile(file.read(), path, "exec", dont_inherit=True)


# --- tracebacks ----------------------------------------------------------------------------------


# Tracebacks as they were: Python 3.11 may crash where their frames go while it leaves by them.
_whole: list[types.TracebackType | None] = []


def _print_traceback_as_python(then: Callable[[], object]) -> None:
    """Have the exception that is on its way out printed without our lines, and ``then`` called."""
    printing = sys.excepthook  # the program's, where it has set one

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        sys.excepthook = printing
        _whole.append(traceback)
        _clean(error, set())
        sys.last_traceback = error.__traceback__
        try:
            printing(kind, error, error.__traceback__)
        finally:
            then()

    sys.excepthook = hook


def _clean(error: BaseException | None, seen: set[int]) -> None:
    """Take our lines out of the traceback of ``error``, and of those that led to it."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    entries = _entries(error.__traceback__)
    above = (_execute.__code__, _code.__code__)
    first = max((k + 1 for k, e in enumerate(entries) if e.tb_frame.f_code in above), default=0)
    error.__traceback__ = _chained(_theirs(entries[first:], error))
    _clean(error.__cause__, seen)
    _clean(error.__context__, seen)
    for part in getattr(error, "exceptions", ()):
        _clean(part, seen)


def _theirs(entries: list[types.TracebackType], error: BaseException) -> list[types.TracebackType]:
    """The lines of the program, and ours at the end where the error is ours or may be.

    torch raises RuntimeError for what the program did, in a kernel of ours perhaps, and we never do.
    """
    kept = len(entries)
    if isinstance(error, HalfstepError) or not isinstance(error, RuntimeError):
        while kept and _is_ours(entries[kept - 1]):
            kept -= 1
    else:
        kernels = (k for k, e in enumerate(entries) if e.tb_frame.f_code.co_filename in _KERNELS)
        entries = entries[: next(kernels, kept)]
        while entries and _is_compilers(entries[-1]):  # around a dispatch mode's function
            entries.pop()
    theirs = [
        entry
        for k, entry in enumerate(entries[:kept])
        if not (_is_ours(entry) or (k and _is_ours(entries[k - 1]) and _is_compilers(entry)))
    ]
    return [*theirs, *entries[kept:]]


def _is_ours(entry: types.TracebackType) -> bool:
    return entry.tb_frame.f_code.co_filename.startswith(_OURS)


def _is_compilers(entry: types.TracebackType) -> bool:
    """True for what `torch.compiler.disable` puts above a function."""
    return entry.tb_frame.f_code.co_filename.endswith(
        ("_dynamo/eval_frame.py", "torch/_compile.py")
    )


def _entries(traceback: types.TracebackType | None) -> list[types.TracebackType]:
    found = []
    while traceback is not None:
        found.append(traceback)
        traceback = traceback.tb_next
    return found


def _chained(entries: list[types.TracebackType]) -> types.TracebackType | None:
    first: types.TracebackType | None = None
    for entry in reversed(entries):
        first = types.TracebackType(first, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return first


# --- waiting for an import -----------------------------------------------------------------------


def when_loaded(name: str, call: Callable[[], None]) -> None:
    """``call()`` as soon as the program has imported the module ``name``; now, if it is there.

    A program may set environment variables before it imports torch: we do not import it for it.
    """
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Waiting(name, call))


class _Waiting:
    """A finder that finds what the others do, and has ``call`` follow the module's execution."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self._name = name
        self._call = call

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        execute = loader.exec_module

        def execute_and_call(module: types.ModuleType) -> None:
            execute(module)
            del loader.exec_module
            self._call()

        loader.exec_module = execute_and_call
        return spec
