"""One policy, two executors: the same recipe by `halfstep.switch` and by `halfstep.emulate`.

Forward and backward have the same rounding points. Where both add in the same order, results are equal bit
for bit; the exceptions say why, and have the bound of their one difference.
"""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfstep
from against_fp32 import UNIT
from error_bounds import flips, gamma, random_walk


class Block(nn.Module):
    """A transformer block; attention by hand, or by torch's function."""

    def __init__(self, by_hand):
        super().__init__()
        d = 16
        self.by_hand = by_hand
        self.table, self.place = nn.Embedding(11, d), nn.Parameter(torch.randn(6, d) / 10)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.head = nn.Linear(d, 4)

    def forward(self, tokens):
        x = self.table(tokens) + self.place
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            hidden = torch.ones(6, 6).triu(1).bool()
            scores = (q @ k.transpose(-1, -2)) / 8**0.5
            y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return self.head(x + self.mlp(self.norm2(x))).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind, **kwargs):
        super().__init__()
        self.layers = kind(8, 12, batch_first=True, **kwargs)
        self.head = nn.Linear(24 if kwargs.get("bidirectional") else 12, 4)

    def forward(self, x):
        return self.head(self.layers(x)[0][:, -1])


def mlp():
    return nn.Sequential(
        nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


SERIES = (8, 5, 8)
PROGRAMS = {
    "mlp": (mlp, lambda: torch.randn(8, 8)),
    "cnn": (cnn, lambda: torch.randn(8, 3, 10, 10)),
    "transformer": (lambda: Block(by_hand=True), lambda: torch.randint(0, 11, (8, 6))),
    "attention": (lambda: Block(by_hand=False), lambda: torch.randint(0, 11, (8, 6))),
    "lstm": (
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        lambda: torch.randn(SERIES),
    ),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(SERIES)),
    "rnn": (lambda: Recurrent(nn.RNN), lambda: torch.randn(SERIES)),
}
RECIPES = ["fp16", "bf16", "fp16-noscale", "fp16-acc16", "fp16-acc16-chunk64", "fp16-nomaster"]
BY_ROLE = [
    "fp8:keep=none",
    "mxfp8",
    "mxfp6",
    "nvfp4:keep=none,hadamard=0,gradient_rounding=nearest",
    "int8:keep=none",
    "fp8-block:keep=none",
]

STEPS = 2


def apart(name, recipe):
    """How far the two may lie apart, relative, normwise; 0 where they are equal bit for bit."""
    u = UNIT["bf16" if recipe == "bf16" else "fp16"]
    if name == "cnn":
        # Convolutions, norms, pooling, the last layer: six roundings, and as many of gradients. The two
        # BatchNorm kernels, which sum in float64, scale and shift in another order: eight FP32 roundings.
        return flips(STEPS * 2 * 6, u, 2 * 8)
    if name == "attention":
        # The switch keeps the scores of fused attention in FP32; here the product and its scaling are
        # rounded, and so are their gradients.
        return random_walk(STEPS * 2 * 2, u)
    if name in ("lstm", "gru", "rnn") and recipe == "bf16":
        # The switch runs bf16 layers in oneDNN's fused kernel, which has other rounding points of its own:
        # taken to be two in each time step of each layer, and two backward (not checked in its source).
        layers = 2 if name == "lstm" else 1
        return random_walk(STEPS * 2 * 2 * SERIES[1] * layers, u)
    return 0.0


def both(name, recipe, steps=STEPS):
    make, data = PROGRAMS[name]
    torch.manual_seed(1)
    switched, x = make(), data()
    y = torch.randint(0, 4, (8,))
    emulated = copy.deepcopy(switched)

    def train(model, optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            out = model(x)
            nn.functional.cross_entropy(out, y).backward()
            optimizer.step()
        return out.detach()

    outs = []
    optimizer = torch.optim.SGD(switched.parameters(), lr=0.1, momentum=0.9)
    switch = halfstep.switch(switched, optimizer, recipe)
    outs.append(train(switched, optimizer))
    switch.off()
    optimizer = torch.optim.SGD(emulated.parameters(), lr=0.1, momentum=0.9)
    with halfstep.emulate(recipe) as emulation:
        outs.append(train(emulated, optimizer))
    assert emulation.unknown == ()
    assert emulation.summary().skipped_steps == switch.skipped_steps == 0
    assert emulation.loss_scale == switch.loss_scale
    pairs = {"output": tuple(outs)}
    for (key, a), b in zip(switched.named_parameters(), emulated.parameters(), strict=True):
        assert a.dtype == b.dtype == b.grad.dtype == torch.float32
        pairs[key], pairs[f"{key}.grad"] = (a, b), (a.grad, b.grad)
    return pairs


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_two_steps_are_the_same(name, recipe):
    bound = apart(name, recipe)
    for key, (a, b) in both(name, recipe).items():
        if not bound:
            assert torch.equal(a, b), key
            continue
        assert (a - b).norm() <= bound * a.norm(), key


@pytest.mark.parametrize("recipe", BY_ROLE)
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_operands_by_role_are_the_same(name, recipe):
    """Each is rounded to the store format, then to its role's, in blocks along what is summed over."""
    for key, (a, b) in both(name, recipe, 1).items():
        if not key.endswith(("weight", "weight.grad")):
            assert torch.equal(a, b), key
            continue
        # The two transpose another side of a weight's gradient, which sums over 8 x 6 rows at most.
        assert (a - b).norm() <= flips(1, UNIT["bf16"], 2 * 48) * a.norm(), key


def test_a_scale_is_of_no_account_but_where_gradients_are_small():
    """Every gradient but the smallest is the same at any scale that is a power of two."""
    scaled, plain = both("mlp", "fp16:initial=1024", 1), both("mlp", "fp16-noscale", 1)
    for key, (_, b) in scaled.items():
        large = b.abs() > 2.0**-10
        assert large.any()
        # A number below fp16's normal ones, 2^-14, is off by up to 2^-25, and a sum has 32 of them, times
        # weights below 1, in each of three layers; each of their sums is rounded once more.
        atol, rtol = 3 * 32 * 2.0**-25, gamma(3, UNIT["fp16"])
        assert torch.allclose(b[large], plain[key][1][large], rtol=rtol, atol=atol)


def test_small_gradients_live_by_the_scale_alone():
    model = nn.Linear(4, 4)
    nn.init.ones_(model.weight)
    x = torch.ones(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {}
    for recipe in ("fp16:initial=1024", "fp16-noscale", "bf16"):
        optimizer.zero_grad()
        with halfstep.emulate(recipe):
            (model(x) * 1e-8).sum().backward()
        found[recipe] = model.weight.grad.clone()
    assert found["fp16-noscale"].count_nonzero() == 0  # below half of fp16's smallest, 2^-24
    right = torch.full((4, 4), 2e-8)
    # Rounded as 1e-8 and as the sum of two; times 1024 both lie below fp16's normal numbers, 2^-24 apart.
    rtol = 2.0**-25 / (1e-8 * 1024) + 2.0**-25 / (2e-8 * 1024)
    assert torch.allclose(found["fp16:initial=1024"], right, rtol=rtol)
    assert torch.allclose(found["bf16"], right, rtol=gamma(2, UNIT["bf16"]))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_large_recurrent_layer_is_the_switchs_bit_for_bit(kind):
    """Its products are oneDNN's there, in the backward too: nothing is rounded again, or in no list."""

    def train(emulated):
        torch.manual_seed(0)
        layer = kind(64, 128, batch_first=True)
        x = torch.randn(8, 16, 64)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        switch = None if emulated else halfstep.switch(layer, optimizer, "fp16:initial=1024")
        with halfstep.emulate("fp16:initial=1024" if emulated else "fp32") as emulation:
            out = layer(x)[0]
            (out * torch.ones(())).sum().backward()
        if switch is not None:
            switch.off()
        return out.detach(), [p.grad for p in layer.parameters()], str(emulation.summary())

    wanted, got = train(False), train(True)
    assert torch.equal(wanted[0], got[0])
    for a, b in zip(wanted[1], got[1], strict=True):
        assert torch.equal(a, b)
    assert "in no list" not in got[2]


# What is between two layers: operations that torch's lists put into another class than "dot product", matrix
# algebra whose backward is made of products, single numbers in a backward, padding on one side.
BETWEEN = {
    "cdist": lambda model, h: torch.cdist(h, h),
    "bilinear": lambda model, h: F.bilinear(h, h, model.square[None]).expand(6, 6),
    "dot": lambda model, h: torch.dot(h[0], h[1]) * h,
    "inverse": lambda model, h: h @ torch.linalg.inv(model.square + 3 * torch.eye(6)),
    "logcumsumexp": lambda model, h: h.logcumsumexp(1),
    "over a single number": lambda model, h: h / (h.std() + 1e-3),
    "same": lambda model, h: F.conv1d(
        h.view(6, 2, 3), model.square[:4].view(2, 2, -1)[..., :2], padding="same"
    ).reshape(6, 6),
}


class Between(nn.Module):
    def __init__(self, name):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.square = nn.Parameter(torch.randn(6, 6) * 0.3)
        self.name = name

    def forward(self, x):
        return self.last(BETWEEN[self.name](self, self.first(x)))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("recipe", ["fp16", "bf16", "mxfp8"])
@pytest.mark.parametrize("name", BETWEEN)
def test_between_two_layers_both_round_at_the_same_points(name, recipe):
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(4))
    found = []
    for emulated in (False, True):
        model = Between(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if not emulated:
            halfstep.switch(model, optimizer, recipe)
        with halfstep.emulate(recipe) if emulated else contextlib.nullcontext():
            (model(x).float().square().mean() * 1e-3).backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    # A few roundings of the store format more or less: a single number is wide in an emulation.
    bound = 2 * UNIT[{"mxfp8": "bf16"}.get(recipe, recipe)]
    assert found[0].isfinite().all()
    assert (found[0] - found[1]).norm() <= bound * found[0].norm()
