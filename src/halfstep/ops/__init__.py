"""How a tensor is rounded and multiplied: the reference in plain torch, and native kernels."""

from halfstep.ops.backends import Backend, Choice, choose, explain
from halfstep.ops.block_tensor import BlockTensor
from halfstep.ops.blocks import block_rounder, kernel_rounder, quantize_blocks, round_blocks
from halfstep.ops.convolution import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from halfstep.ops.counting import count_nonfinite, unscale
from halfstep.ops.matmul import matmul
from halfstep.ops.products import multiply
from halfstep.ops.random_bits import Key, draw_key, random_bits
from halfstep.ops.rounding import round_to, rounder, row_rounder
from halfstep.ops.sparsity import prune_2_4
from halfstep.ops.stepping import AdamRule, SgdRule, adam_step, sgd_step

__all__ = [
    "AdamRule",
    "Backend",
    "BlockTensor",
    "Choice",
    "Key",
    "SgdRule",
    "adam_step",
    "block_rounder",
    "choose",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "count_nonfinite",
    "draw_key",
    "explain",
    "kernel_rounder",
    "matmul",
    "multiply",
    "prune_2_4",
    "quantize_blocks",
    "random_bits",
    "round_blocks",
    "round_to",
    "rounder",
    "row_rounder",
    "sgd_step",
    "unscale",
]
