"""Two models switched in two threads do not disturb each other."""

import threading

import torch
from torch import nn

import halfstep

RECIPES = ("fp16", "bf16")


def prepare(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
    return model, [torch.randn(8, 16) for _ in range(30)]


def train(model, batches, recipe):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, recipe=recipe)
    losses = []
    for x in batches:
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    switch.off()
    return losses


def test_threads_train_as_they_would_alone():
    fast_path = torch.backends.mha.get_fastpath_enabled()
    alone = {recipe: train(*prepare(seed), recipe) for seed, recipe in enumerate(RECIPES)}
    prepared = {recipe: prepare(seed) for seed, recipe in enumerate(RECIPES)}
    start, together = threading.Barrier(len(RECIPES)), {}

    def run(recipe):
        start.wait()
        together[recipe] = train(*prepared[recipe], recipe)

    threads = [threading.Thread(target=run, args=(recipe,)) for recipe in RECIPES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
