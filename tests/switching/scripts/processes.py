"""Processes of every kind of start, with a class of ``__main__`` going there and back."""

import multiprocessing
import sys


class Box:
    def __init__(self, value):
        self.value = value


def double(box):
    return Box(2 * box.value), "halfstep.switching" in sys.modules, sys.modules["__main__"].__name__


if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            box, loaded, name = pool.apply(double, (Box(method),))
        print(method, box.value, loaded, name)
