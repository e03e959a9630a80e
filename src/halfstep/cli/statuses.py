"""With what a command leaves: 0 done, 1 the answer is no, 2 misuse, 130 interrupted."""

from __future__ import annotations

from typing import Final

__all__ = ["MISUSE", "NO"]

NO: Final = 1
MISUSE: Final = 2
