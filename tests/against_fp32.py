"""The same program twice: plain FP32, and switched to a recipe; and how far apart they may be.

Rounding to a format with p bits of significand is off by at most 2^-p of the value (``UNIT``). A gradient
that went through k roundings, each on a value of its own size, is off by at most about k units, normwise.
"""

import copy
import itertools

import torch
from torch import nn

import halfstep

UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
# At which the loss scale is neither 1 nor what any test would hit by chance.
RECIPES = ["bf16", "fp16:initial=1", "fp16:initial=8192"]
# Forward and backward of one layer: input, weight, product, activation; each twice, and double for safety.
PER_LAYER = 16


def unit(recipe):
    return UNIT["bf16" if str(recipe).startswith("bf16") else "fp16"]


def mlp(inputs=6, width=16, outputs=4, layers=3, seed=0):
    """A small smooth network: every derivative is continuous, so that roundings change it little."""
    torch.manual_seed(seed)
    sizes = [inputs] + [width] * (layers - 1) + [outputs]
    parts = []
    for a, b in itertools.pairwise(sizes):
        parts += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


def batch(n=8, inputs=6, outputs=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, inputs, generator=generator),
        torch.randn(n, outputs, generator=generator),
    )


def sgd(model, lr=0.1, **kwargs):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def both(program, recipe, make=mlp, optimizer=sgd):
    """``program(model, optimizer, switch)`` on FP32 twin and on the switched one: (wanted, got)."""
    plain = make()
    twin = copy.deepcopy(plain)
    plain_optimizer, twin_optimizer = optimizer(plain), optimizer(twin)
    wanted = program(plain, plain_optimizer, halfstep.switch(plain, plain_optimizer, "fp32"))
    switch = halfstep.switch(twin, twin_optimizer, recipe)
    try:
        got = program(twin, twin_optimizer, switch)
    finally:
        switch.off()
    return wanted, got


def assert_close(got, wanted, recipe, roundings=3 * PER_LAYER):
    """Normwise, tensor by tensor: ``|got - wanted| <= roundings * unit * |wanted|``, and FP32."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for name in wanted:
            try:
                assert_close(got[name], wanted[name], recipe, roundings)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        return
    assert got.dtype == wanted.dtype == torch.float32
    assert wanted.norm() > 0, "nothing to compare"
    error = ((got - wanted).norm() / wanted.norm()).item()
    ratio = (got.norm() / wanted.norm()).item()
    bound = roundings * unit(recipe)
    assert bound < 0.5, "this would not see a factor of two"
    assert error <= bound, f"relative error {error:.3g} > {bound:.3g} (norms {ratio:.3g} : 1)"
