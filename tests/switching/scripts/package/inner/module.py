"""Run as ``-m package.inner.module``."""

import sys

from .. import __name__ as above  # noqa: TID252 - it is what is tested

value = above

if __name__ == "__main__":
    print(__name__, __package__, __spec__.name, __file__, sys.argv, sys.path[0])
    raise RuntimeError("from a module")
