"""How a tensor is rounded and multiplied: the reference in plain torch, and native kernels."""

from halfstep.ops.backends import Backend, Choice, choose, explain
from halfstep.ops.counting import count_nonfinite, unscale
from halfstep.ops.matmul import matmul, multiply
from halfstep.ops.random_bits import Key, draw_key, random_bits
from halfstep.ops.rounding import round_to

__all__ = [
    "Backend",
    "Choice",
    "Key",
    "choose",
    "count_nonfinite",
    "draw_key",
    "explain",
    "matmul",
    "multiply",
    "random_bits",
    "round_to",
    "unscale",
]
