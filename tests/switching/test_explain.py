"""``switch.explain()``: that executors, reasons and times are true."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import halfstep
from halfstep.recipe import Recipe
from halfstep.switching import engine, overrides, speeds
from halfstep.switching.met import Met
from halfstep.switching.plan import Executor, Kind, make_plan
from halfstep.switching.region import loose_region

PRODUCTS = """
    mm addmm bmm baddbmm mv convolution mkldnn_rnn_layer _linear_pointwise
    _scaled_dot_product_flash_attention_for_cpu
"""


class Products(TorchDispatchMode):
    """The dtypes that torch's dot products are given."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.rpartition("::")[2] in PRODUCTS.split():
            self.dtypes |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def rows(recipe):
    return {row.kind: row for row in make_plan(Recipe.parse(recipe), "cpu").rows}


@pytest.mark.parametrize("kind", [Kind.MATMUL, Kind.CONVOLUTION, Kind.ATTENTION, Kind.RECURRENT])
@pytest.mark.parametrize("recipe", ["fp16", "bf16", "nvfp4"])
def test_the_executor_is_who_computes(recipe, kind):
    plan = make_plan(Recipe.parse(recipe), "cpu")
    program, *sizes = speeds.PROGRAMS[kind]
    leaves = [torch.ones(size).to(plan.low) for size in sizes]
    uninstall = overrides.install(plan)
    try:
        region = loose_region(plan, Met())
        with Products() as seen, region.opened(), overrides.autocast(plan):
            program(*leaves)
    finally:
        uninstall()
    native = rows(recipe)[kind.value].executor is Executor.NATIVE
    assert seen.dtypes == {plan.low if native else torch.float32}


def flags():
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("no /proc/cpuinfo")
    line = next(line for line in info.read_text().splitlines() if line.startswith("flags"))
    return set(line.split())


def test_the_reasons_are_this_cpus():
    there = flags()
    why = rows("bf16")[Kind.MATMUL.value].why
    assert ("no bf16 instructions" in why) == (not there & {"avx512_bf16", "amx_bf16"})
    why = rows("fp16")[Kind.MATMUL.value].why
    assert ("this CPU has no half GEMM" in why) == ("amx_fp16" not in there)


def test_times_are_measured_once_and_printed():
    switch = halfstep.switch(nn.Linear(2, 2), None, "bf16")
    explanation = switch.explain()
    assert explanation.times.keys() == {kind.value for kind in Kind}
    assert all(math.isfinite(t) and t > 0 for t in explanation.times.values())
    assert switch.explain().times == explanation.times  # as no second measurement would have them
    line = next(line for line in str(explanation).splitlines() if line.startswith("matrix"))
    t = explanation.times[Kind.MATMUL.value]
    assert f"{t:.1f}x FP32" in line or f"{t:.0f}x FP32" in line


def test_a_plan_that_changes_nothing_has_no_times():
    switch = halfstep.switch(nn.Linear(2, 2), None, "fp32")
    assert not switch.explain().times and "x FP32" not in str(switch.explain())


def test_a_slow_kind_is_slow():
    """A sum that is rounded after every addition cannot be as fast as FP32's."""
    times = halfstep.switch(nn.Linear(2, 2), None, "fp16-acc16").explain().times
    assert times[Kind.MATMUL.value] > 1.5


class Listener:
    def __init__(self):
        self.heard = 0

    def before(self, roots, wanted):
        self.heard += 1


def test_measuring_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(speeds, "_known", {})
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, "fp16")
    state, threads, listener = torch.get_rng_state(), torch.get_num_threads(), Listener()
    end = engine.install(listener.before)
    with torch.inference_mode():
        switch.explain()
    end()
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert not listener.heard and not switch.steps
    switch.off()
    assert switch.explain().times  # kernels are there while it measures
    assert not overrides._installed
