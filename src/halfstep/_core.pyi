"""The extension that CMakeLists.txt builds from ``_core/``; called by `halfstep.ops.native` only."""

class Grid:
    """The numbers to round to; see ``_core/types.hpp``."""

    def __init__(
        self,
        *,
        quantum_exponent: int,
        mantissa_bits: int,
        highest: float,
        lowest: float,
        overflow_up: float,
        overflow_down: float,
        infinity_up: float,
        infinity_down: float,
        negative_zero: bool,
    ) -> None: ...

def round_float32(
    x: int, out: int, n: int, grid: Grid, rounding: int, key_low: int, key_high: int, threads: int
) -> None: ...
def round_float64(
    x: int, out: int, n: int, grid: Grid, rounding: int, key_low: int, key_high: int, threads: int
) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
