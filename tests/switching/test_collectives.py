"""Gradients that are averaged by hand: a collective writes to p.grad without telling torch."""

import math

import pytest
import torch
import torch.distributed as dist

import halfstep
from against_fp32 import batch, mlp, sgd

X, Y = batch()


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recipe", ["fp16:initial=1024", "fp16-nomaster:initial=1024"])
def test_an_overflow_that_arrives_from_another_rank_is_seen(group, recipe):
    model = mlp()
    optimizer = sgd(model)
    switch = halfstep.switch(model, optimizer, recipe)
    (model(X) - Y).square().mean().backward()
    before = model[2].weight.detach().clone()
    for p in model.parameters():
        dist.all_reduce(p.grad.data)
    written = model[2].weight.grad
    version = written._version
    written.data[0, 0] = math.inf  # what the sum is where another rank overflowed
    assert written._version == version, "torch would have told"
    optimizer.step()
    assert not switch.last_step.applied
    assert switch.last_step.nonfinite == {"2.weight": 1}
    assert torch.equal(model[2].weight, before)
