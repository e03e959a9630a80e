"""One rank of several: parallel.py RANK RANKS FOLDER KIND... Asserts; says ``KIND ok`` on rank 0.

Every rank trains on its part of one batch. The whole batch on one process is the reference.
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import halfstep
from against_fp32 import PER_LAYER, assert_close, unit
from halfstep.errors import NonFiniteError, SwitchError

RECIPE = "fp16:initial=8192"
PER_RANK = 4


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.LayerNorm(16),
        nn.Tanh(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 4),
    )


def spread(kind, seed=0):
    """(model, optimizer, switch) of a kind."""
    kind, _, compiled = kind.partition("+")
    model = plain()
    if seed:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "fully_shard":
        for module in (model[0], model[3]):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "tensor":
        parallelize_module(model, mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})
    elif kind != "ddp-later":
        model = DistributedDataParallel(model)
    if kind == "zero":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    switch = halfstep.switch(model, optimizer, RECIPE)
    if kind == "ddp-later":
        model = DistributedDataParallel(model)
    if compiled:
        model = torch.compile(model, backend="aot_eager")
    return model, optimizer, switch


def whole(tensors):
    return [t.full_tensor() if isinstance(t, DTensor) else t.detach() for t in tensors]


def mean_square(out, y):
    return (out - y).square().mean()


def check(kind, folder):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(PER_RANK * ranks, 8, generator=g),
        torch.randn(PER_RANK * ranks, 4, generator=g),
    )
    part = slice(None) if kind == "tensor" else slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    # Tensor parallel: all ranks compute one loss.
    guilty = kind == "tensor" or rank == 1

    reference = plain()
    alone = halfstep.switch(reference, torch.optim.SGD(reference.parameters(), lr=0), RECIPE)
    mean_square(reference(x), y).backward()
    alone.off()
    wanted = [p.grad for p in reference.parameters()]

    model, optimizer, switch = spread(kind)

    def backward(factor=1.0):
        (mean_square(model(x[part]), y[part]) * factor).backward()

    if kind == "no_sync":
        with model.no_sync():
            backward(0.5)
        backward(0.5)
    else:
        backward()
    for got, grad in zip(whole(p.grad for p in model.parameters()), wanted, strict=True):
        assert_close(got, grad, RECIPE, 2 * 3 * PER_LAYER)
    optimizer.step()
    assert switch.last_step.applied
    assert switch.steps == 1
    switch.audit()

    # One rank overflows: all skip, and have one scale.
    before = whole(model.parameters())
    optimizer.zero_grad()
    backward(1e12 if guilty else 1.0)
    optimizer.step()
    report = switch.last_step
    assert not report.applied
    assert switch.loss_scale == 4096
    assert all(map(torch.equal, whole(model.parameters()), before))
    reports = [None] * ranks
    dist.all_gather_object(reports, report)
    assert all(r == reports[0] for r in reports), reports
    sizes = {
        n.removeprefix("_orig_mod.").removeprefix("module."): p.numel()
        for n, p in model.named_parameters()
    }
    for name, count in report.nonfinite.items():
        assert count <= sizes[name.removeprefix("module.")], report

    # The loss of one rank is NaN: all raise, none waits for another.
    optimizer.zero_grad()
    backward(float("nan") if guilty else 1.0)
    try:
        optimizer.step()
    except NonFiniteError as error:
        says = "the loss itself is not finite (nan)" if guilty else "the loss on rank 1 is not fin"
        assert says in str(error), error
    else:
        raise AssertionError("no error")
    assert all(map(torch.equal, whole(model.parameters()), before))

    # Saved, and resumed by another model of the kind: the same step.
    path = folder / f"{kind}.pt"
    switch.save(path, epoch=1)

    def step():
        optimizer.zero_grad()
        backward()
        optimizer.step()
        return whole(model.parameters())

    then = step()
    switch.off()
    model, optimizer, switch = spread(kind, seed=1)
    assert switch.resume(path).more == {"epoch": 1}
    assert switch.loss_scale == 4096
    if ranks == 2:
        assert all(map(torch.equal, step(), then))
    else:
        # DistributedDataParallel forms its buckets anew after a first backward; the order in which gloo adds
        # three numbers follows from their places in them: of a step of lr = 0.01, a thousandth.
        for got, want in zip(step(), then, strict=True):
            torch.testing.assert_close(got, want, rtol=0.0, atol=1e-5)
    switch.off()
    if kind == "fully_shard":  # and by one process, without any group
        assert_plain(path, reference, before)


def assert_plain(path, reference, before):
    model = copy.deepcopy(reference)
    switch = halfstep.switch(model, torch.optim.AdamW(model.parameters(), lr=0.01), RECIPE)
    switch.resume(path)
    assert all(map(torch.equal, model.parameters(), before))
    switch.off()


def check_compression():
    """16 bits between ranks: off by no more than their roundings, measured; no overflow by the sum."""
    ranks = dist.get_world_size()
    for numbers, factor in (("fp16", 1.0), ("bf16", 1.0), ("fp16", 0.999 * 65504 / 8192)):
        gradients = []
        for compressed in (False, True):
            torch.manual_seed(dist.get_rank())
            weights = torch.randn(1000).abs() * factor / 5
            weights[0] = factor
            model = DistributedDataParallel(nn.Linear(1000, 1, bias=False))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            switch = halfstep.switch(model, optimizer, RECIPE)
            if compressed:
                switch.compress_gradients(model, numbers)
            model(weights[None]).sum().backward()
            gradients.append(model.module.weight.grad.clone())
            optimizer.step()
            assert switch.last_step.applied, (numbers, factor)
            switch.off()
        sums = weights.abs()
        dist.all_reduce(sums)
        least = 0.0 if numbers == "bf16" else ranks * 2.0**-25 / 8192
        # The reference is a sum in FP32 itself: ranks - 1 additions of it.
        allowed = (unit(numbers) + ranks * 2.0**-24) * sums + least
        error = (gradients[1] - gradients[0]).abs()[0]
        assert (error <= allowed).all(), (error / allowed).max()
        assert error.max() > 0, "nothing was compressed"
        if dist.get_rank() == 0:
            relative = (error.norm() / gradients[0].norm()).item()
            print(f"compression {numbers} error {relative:.2g}", flush=True)


def check_kept(folder):
    """Sharded weights and moments are kept as the recipe says, near those of one process, and resume."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(ranks * PER_RANK, 8, generator=g),
        torch.randn(ranks * PER_RANK, 4, generator=g),
    )
    part = slice(rank * PER_RANK, (rank + 1) * PER_RANK)

    def made(recipe, sharded, seed=0):
        model = plain()
        torch.manual_seed(seed)
        if sharded:
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, halfstep.switch(model, optimizer, recipe)

    def train(model, optimizer, steps, rows):
        for _ in range(steps):
            optimizer.zero_grad()
            mean_square(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return whole(model.parameters())

    for recipe in ("bf16-sr", "bf16-kahan", "fp16:moments=bf16", "bf16:moments=e4m3fn@1x128"):
        model, optimizer, switch = made(recipe, sharded=False)
        alone = train(model, optimizer, 4, slice(None))
        switch.off()
        model, optimizer, switch = made(recipe, sharded=True)
        found = train(model, optimizer, 4, part)
        # Four steps of Adam move a weight by up to 0.04, and one whose gradient is near 0 either way.
        apart = torch.cat([(a - b).flatten() for a, b in zip(found, alone, strict=True)]).abs()
        assert apart.mean() < 0.002, (recipe, apart.mean())
        if "moments" not in recipe:
            assert all(torch.equal(p, p.bfloat16().float()) for p in found)
        switch.audit()
        path = folder / "kept.pt"
        switch.save(path)
        then = train(model, optimizer, 2, part)
        switch.off()
        model, optimizer, switch = made(recipe, sharded=True, seed=1)
        switch.resume(path)
        assert all(map(torch.equal, train(model, optimizer, 2, part), then)), recipe
        switch.off()

    # Two shards of equal numbers draw other bits; what every rank has whole is the same on all.
    model = nn.Linear(64, 2 * ranks, bias=False)
    nn.init.constant_(model.weight, 1.0 + 2.0**-9)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-12)
    switch = halfstep.switch(model, optimizer, "bf16-sr")
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    rows = model.weight.full_tensor().chunk(ranks)
    assert not torch.equal(rows[0], rows[1])
    switch.off()

    try:
        made("bf16-pure", sharded=True)
    except SwitchError as error:
        assert "switch the model first" in str(error), error
    else:
        raise AssertionError("no error")


def main(rank, ranks, folder, kinds):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=3),
    )
    for kind in kinds:
        if kind == "compression":
            check_compression()
        elif kind == "kept":
            check_kept(folder)
        else:
            check(kind, folder)
        dist.barrier()
        if rank == 0:
            print(kind, "ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
