"""Accelerate, with the switch in its checkpoints and its schedulers."""

import tempfile

import torch
from accelerate import Accelerator

import halfstep
from halfstep.switching.frameworks.accelerate import follow

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
x = torch.randn(64, 8)
data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
loader = torch.utils.data.DataLoader(data, 16)

switch = halfstep.switch(model, optimizer, recipe="fp16")
accelerator = Accelerator(cpu=True)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
follow(accelerator, switch)
for batch, labels in loader:
    loss = torch.nn.functional.cross_entropy(model(batch), labels)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()  # stays where it is when the step was skipped
    optimizer.zero_grad()
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator.load_state(folder)
print(switch.last_step)
