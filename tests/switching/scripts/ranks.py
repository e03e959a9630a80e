"""Two processes under torchrun: an overflow on one of them must be skipped by both."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def same_everywhere(tensors):
    mine = torch.cat([t.detach().flatten() for t in tensors])
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    return all(torch.equal(t, all_of_them[0]) for t in all_of_them)


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(dist.get_rank())
    for step in range(5):
        x = torch.randn(16, 8, generator=data)
        if step == 2 and dist.get_rank() == 1:
            x *= 3000
        optimizer.zero_grad()
        model(x).square().mean().backward()
        gradients = [torch.nan_to_num(p.grad, 1.0, 2.0, 3.0) for p in model.parameters()]
        finite = all(bool(p.grad.isfinite().all()) for p in model.parameters())
        same = same_everywhere(gradients)
        optimizer.step()
        if dist.get_rank() == 0:
            print(step, same, finite, same_everywhere(model.parameters()), flush=True)
        else:
            same_everywhere(model.parameters())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
