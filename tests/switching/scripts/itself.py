"""Prints what a program can see of itself, then fails with a chain of errors."""

from __future__ import annotations

import atexit
import dataclasses
import inspect
import pickle
import sys
import typing


@dataclasses.dataclass
class Point:
    x: int

    def twice(self) -> Point:
        return Point(2 * self.x)


print(sorted(name for name in globals() if name.startswith("__")))
print(__name__, __file__, __spec__, __package__, __doc__, __cached__, type(__builtins__))
print(type(__loader__), __loader__.name, __loader__.path)
print(sys.argv, sys.path[0], sys.modules["__main__"].Point is Point, sys.flags.optimize)
print(sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__)
print(pickle.dumps(Point(1)), pickle.loads(pickle.dumps(Point(1))).twice())
print(inspect.getsource(Point))
print(typing.get_type_hints(Point.twice)["return"] is Point)
print(input("name? "), sys.stdin.read())
atexit.register(print, "at exit")


def inverse(x):
    return 1 / x


if __name__ == "__main__":
    try:
        inverse(0)
    except ZeroDivisionError as error:
        raise ExceptionGroup("two", [error, ValueError("one")]) from error
