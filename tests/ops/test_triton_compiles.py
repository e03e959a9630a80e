"""Triton's kernels compile to machine code of GPUs that are not there, and to the instructions meant."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfstep.format import Accumulator, BlockFormat, Format, Rounding
from halfstep.ops.triton_kernels import blocks, gradients, grid, products, rounding, steps
from halfstep.ops.triton_step import _Rule
import triton.language as tl

def ptx(kernel, types, **constants):
    names = kernel.arg_names
    given = dict(zip([n for n in names if n not in constants], types.split(), strict=True))
    source = ASTSource(
        fn=kernel,
        signature={n: given.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in given.get(n, "")},
    )
    options = {"enable_fp_fusion": kernel not in (steps.adam_kernel, steps.sgd_kernel)}
    found = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    assert found.asm["cubin"]
    return found.asm["ptx"]

fp16, nearest, stochastic = Format.parse("fp16"), Rounding.NEAREST, Rounding.STOCHASTIC
flat = ptx(rounding.round_kernel, "*fp32 *fp32 i32 i32 i32 i32", to=grid.grid_of(fp16, nearest), BLOCK=2048)
every = [flat]
every.append(ptx(
    rounding.round_kernel, "*bf16 *fp16 i64 i32 i32 i32", to=grid.grid_of(fp16, stochastic), BLOCK=2048
))
whole = "*fp32 *fp32 *fp32 *i64 *i64 i32 i32 i32 i32 i32 i32 i32 i32 i32"
for text in ("fp16", "bf16/down/products-rounded/chunk64/between-fp32", "e6m9/stochastic"):
    sums = grid.sums_of(Accumulator.parse(text))
    every.append(ptx(products.matmul_kernel, whole, sums=sums, ROWS=64, COLUMNS=64))
mx = grid.blocks_of(BlockFormat.parse("mxfp4"), stochastic)
every.append(ptx(
    blocks.round_blocks_kernel, "*bf16 *bf16 i32 i32 i32 i32 i32", to=mx, BLOCKS=64, EXTENT=32
))
tables = dict(aligned=True, PART=65536, BLOCK=2048)
every.append(ptx(
    gradients.count_kernel, "*i64 *i64 *i64 *i64 *i64", word=tl.int16, infinity=0x7F80, **tables
))
every.append(ptx(
    gradients.unscale_kernel, "*i64 *i64 *i64 *i64 *i64 fp32", number=tl.bfloat16, **tables
))
rule = _Rule(scales=True, maximize=True, penalizes=True, decays=True, near=True,
             has_momentum=True, fresh=False, nesterov=True)
lists = "*i64 *i64 *i64 *i64 *i64 *i64"
constants = dict(rule=rule, number=tl.float32, copy=tl.float16, to=grid.grid_of(fp16, nearest), **tables)
stepping = [
    ptx(steps.adam_kernel, lists + " *i64 *i64 *fp32 *fp32" + 8 * " fp32", **constants),
    ptx(steps.sgd_kernel, lists + " *i64" + 5 * " fp32", **constants),
]
every += stepping
each = 2048 // 128  # elements of a thread
print("rounds once", [text.count("fma.rn.f32") // each for text in stepping], "sqrt.rn.f32" in stepping[0])
print("four at once", "ld.global.v4" in flat and "st.global.v4" in flat)
print("directed", all(f"fma.{way}.f32" in every[k] for way in ("rm", "rp") for k in (2, 3)))
print("divides", "div.rn.f32" in every[-3])
print("flushes", sum(".ftz" in text for text in every))
print("float64", sum(bool(re.search(r"\\.f64", text)) for text in every))
"""


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_compile_without_a_gpu(capability: int):
    """None flushes subnormal numbers, none needs float64, and sums use the directed FMAs;
    a step fuses what torch fuses, and nothing else."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == [
        "rounds once [3, 4] True",  # only the products that the step adds without rounding them
        "four at once True",
        "directed True",
        "divides True",
        "flushes 0",
        "float64 0",
    ]
