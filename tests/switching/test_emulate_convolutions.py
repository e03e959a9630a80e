"""Convolutions with operands rounded by role: the same tiles by `halfstep.switch` and `halfstep.emulate`.

Channels differ by powers of ten, so that a tile over other axes has another scale.
"""

import copy

import pytest
import torch
from torch import nn

import halfstep
from error_bounds import flips, unit

RECIPES = [
    "fp8:keep=none",
    "mxfp8",
    "nvfp4:keep=none,hadamard=0,gradient_rounding=nearest",
    "int8:keep=none",
    "fp8-block:keep=none",  # a narrow accumulator: blocks along the channels in all three products
    "int8:keep=none,accumulate=fp16",
]
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(36, 40, 3, bias=False), (5, 36, 9)),
    "conv2d": (lambda: nn.Conv2d(36, 40, 3, padding=1, bias=False), (5, 36, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(36, 20, 2, bias=False), (3, 36, 3, 4, 3)),
    "strided": (lambda: nn.Conv2d(36, 40, 3, stride=2, bias=False), (5, 36, 7, 6)),
    "one channel": (lambda: nn.Conv2d(1, 40, 3, bias=False), (5, 1, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(36, 40, 1, bias=False), (5, 36, 4, 4)),
    "grouped": (lambda: nn.Conv2d(72, 40, 3, groups=2, bias=False), (5, 72, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(36, 36, 3, groups=36, bias=False), (5, 36, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(36, 40, 3, stride=2, bias=False), (5, 36, 3, 4)),
    "bias": (lambda: nn.Conv2d(36, 40, 3), (5, 36, 4, 4)),
}


def both(make, shape, recipe, *, of_input):
    """Output and gradients of a layer: of the input, the weight, the bias; by the switch and emulated."""
    torch.manual_seed(3)
    layer = make()
    x = torch.randn(shape)
    x *= torch.logspace(-1, 1, shape[1])[torch.randperm(shape[1])].view(-1, *[1] * (x.dim() - 2))
    with torch.no_grad():
        for axis in (0, 1):
            count = layer.weight.shape[axis]
            spread = torch.logspace(-1, 1, count)[torch.randperm(count)]
            layer.weight *= spread.view(*[1] * axis, -1, *[1] * (layer.weight.dim() - axis - 1))
    grad = torch.randn(layer(x).shape)
    grad *= torch.logspace(-1, 1, grad.shape[1]).view(-1, *[1] * (x.dim() - 2))
    found = []
    for emulated in (False, True):
        model, given = copy.deepcopy(layer), x.clone().requires_grad_(of_input)
        if emulated:
            with halfstep.emulate(recipe):
                out = model(given)
                out.backward(grad)
        else:
            halfstep.switch(model, None, recipe)
            out = model(given)
            out.backward(grad)
        found.append([out.detach().float(), given.grad, *[p.grad for p in model.parameters()]])
    return zip(("output", "input", "weight", "bias"), *found, strict=False)


@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_and_its_gradients_are_the_same(layer, recipe, of_input):
    for key, a, b in both(*LAYERS[layer], recipe, of_input=of_input):
        if a is None:
            assert b is None
        elif layer == "bias" and key == "output":
            # The kernel may add the bias first, the switch does last: each rounding of the sum may differ.
            assert (a - b).norm() <= flips(1, unit(torch.bfloat16), 2 * (36 * 9 + 1)) * a.norm()
        else:
            assert torch.equal(a, b), key


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_a_network(recipe):
    torch.manual_seed(4)
    switched = nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(40, 36, 3, groups=2, bias=False), nn.GELU(),
        nn.ConvTranspose2d(36, 20, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(500, 4),
    )  # fmt: skip
    emulated = copy.deepcopy(switched)
    x, y = torch.randn(8, 3, 12, 12), torch.randint(0, 4, (8,))

    def train(model):
        out = model(x)
        nn.functional.cross_entropy(out, y).backward()
        optimizer.step()
        return out.detach().float()

    optimizer = torch.optim.SGD(switched.parameters(), lr=0.1)
    halfstep.switch(switched, optimizer, recipe)
    expected = train(switched)
    optimizer = torch.optim.SGD(emulated.parameters(), lr=0.1)
    with halfstep.emulate(recipe):
        assert torch.equal(train(emulated), expected)
    for (key, a), b in zip(switched.named_parameters(), emulated.parameters(), strict=True):
        if key == "8.weight":  # a sum over a batch of 8, of which the two transpose another side
            bound = flips(1, unit(torch.bfloat16), 2 * 8)
            assert (a.grad - b.grad).norm() <= bound * a.grad.norm()
            continue
        assert torch.equal(a.grad, b.grad), key
        assert torch.equal(a, b), key
