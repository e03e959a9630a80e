"""Models that are compiled inside a region, and how they are trained, for tests."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import halfstep
from halfstep.study.benchmarks.models import Residual, Transformer


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 10)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


class Several(nn.Module):
    """Checkpointing, no_grad, a buffer, operations of the FP32 class."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.gate, self.out = nn.Linear(16, 16), nn.Linear(16, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            w = self.gate(x).sigmoid()
        x = checkpoint(self.body, x, use_reentrant=False) * w
        return self.out(x) + self.gate(x)[:, :10].exp().log().cumsum(-1)


def cnn():
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8, 16, stride=2)]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 10))


MODELS = {
    "transformer": (
        lambda: Transformer(layers=1, width=32, heads=4),
        lambda n: torch.randint(1000, (n, 12)),
    ),
    "cnn": (cnn, lambda n: torch.randn(n, 3, 8, 8)),
    "attention": (Attention, lambda n: torch.randn(n, 7, 32)),
    "several": (Several, lambda n: torch.randn(n, 16)),
    "mlp": (mlp, lambda n: torch.randn(n, 16)),
}


class Counted:
    """A backend that counts the graphs that it is given."""

    def __init__(self):
        self.backend = torch._dynamo.lookup_backend("aot_eager")
        self.graphs = []

    def __call__(self, graph, inputs, **options):
        self.graphs.append(graph)
        return self.backend(graph, inputs, **options)


def graph_breaks():
    """Those that are not the border of a region."""
    counted = torch._dynamo.utils.counters["graph_break"]
    return [why for why in counted if "border of a region of halfstep" not in why]


def train(name, recipe, compiled=None, sizes=(8, 8, 8)):
    """Losses, last gradients and the output in evaluation; ``compiled``: the function that compiles."""
    make, data = MODELS[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [data(n) for n in sizes]
    switch = halfstep.switch(model, optimizer, recipe)
    called = model if compiled is None else compiled(model)
    losses = []
    for k, x in enumerate(batches):
        if recipe == "fp16":
            switch.load_state_dict({"scale": 2.0 ** (3 * k)})  # in no graph as a constant
        optimizer.zero_grad()
        out = called(x).flatten(0, -2)
        loss = F.cross_entropy(out, torch.arange(len(out)) % 10)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.eval()
    with torch.no_grad():
        out = called(batches[0])
    switch.off()
    return losses, grads, [out]


def same(found, wanted):
    return all(
        torch.equal(a, b)
        for x, y in zip(found, wanted, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def check_bits(name, recipe):
    counted = Counted()
    found = train(name, recipe, lambda m: torch.compile(m, backend=counted))
    assert same(found, train(name, recipe))
    assert (
        len(counted.graphs) == 2
    )  # training and evaluation: none for a step, none for a loss scale
    assert graph_breaks() == []
