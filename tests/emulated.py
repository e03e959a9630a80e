"""Small programs for tests of `halfstep.emulate`."""

import torch
from torch import nn
from torch.nn import functional as F

import halfstep


def on_grid(t, format="fp16"):
    return torch.equal(t, halfstep.round_to(t.detach(), format))


def data(n=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, x @ torch.randn(6, 3, generator=generator)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))


def trained(model, optimizer, steps=30, closure=False):
    x, y = data()

    def evaluate():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    first = evaluate().item()
    for _ in range(steps):
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    return first, evaluate().item()
