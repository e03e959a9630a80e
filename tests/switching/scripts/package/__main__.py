"""Run as ``-m package``."""

import sys

from . import inner
from .inner.module import value

print(__name__, __package__, __spec__.name, sys.argv[1:], value, inner.__name__)
print(sorted(name for name in globals() if name.startswith("__")))
value.missing  # noqa: B018 - fails on purpose
