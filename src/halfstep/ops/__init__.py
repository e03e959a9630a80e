"""How a tensor is rounded and multiplied: the reference in plain torch, and native kernels."""

from halfstep.ops.backends import Backend, Choice, choose, explain
from halfstep.ops.counting import count_nonfinite, unscale
from halfstep.ops.dot import dot_accumulate
from halfstep.ops.random_bits import Key, draw_key, random_bits
from halfstep.ops.rounding import round_to

__all__ = [
    "Backend",
    "Choice",
    "Key",
    "choose",
    "count_nonfinite",
    "dot_accumulate",
    "draw_key",
    "explain",
    "random_bits",
    "round_to",
    "unscale",
]
