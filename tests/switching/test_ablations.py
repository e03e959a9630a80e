"""The ablations of the catalogue: what each leaves out, to the bit."""

import copy

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import assert_close, batch, both, gradients, mlp, sgd
from halfstep import ops
from halfstep.format import Accumulator

X, Y = batch()


def mse(model, x=X, y=Y):
    return (model(x) - y.to(x.dtype)).square().mean()


def on_grid(t):
    return torch.equal(t, t.half().float())


def test_nomaster_keeps_weights_on_the_fp16_grid_from_the_switch_on():
    model = mlp()
    assert not on_grid(model[0].weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    switch = halfstep.switch(model, optimizer, "fp16-nomaster:initial=1024")
    for turn in range(5):
        assert all(p.dtype == torch.float32 and on_grid(p) for p in model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        mse(model).backward()
        if turn == 2:
            model[0].bias.grad[0] = torch.inf
        optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (turn == 2)
    # The optimizer's own state is FP32 and off the grid: only the weights are kept in 16 bits.
    assert not on_grid(optimizer.state[model[0].weight]["exp_avg"])
    switch.off()
    assert all(on_grid(p) for p in model.parameters())


def test_nomaster_swallows_an_update_below_half_a_step_of_the_grid_and_fp16_does_not():
    for recipe, moves in (("fp16", True), ("fp16-nomaster", False)):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-13)
        halfstep.switch(model, optimizer, recipe + ":initial=16")
        for _ in range(8):  # 8 updates of 2^-13: together 2^-10, the grid's step at 1
            optimizer.zero_grad()
            model(-torch.ones(1, 1)).sum().backward()
            optimizer.step()
        assert model.weight.item() == (1.0 + 2.0**-10 if moves else 1.0)


@pytest.mark.parametrize("initial", [1, 4096])
def test_nomaster_gradients_are_those_of_the_rounded_weights(initial):
    def program(model, optimizer, switch):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.half())
        mse(model).backward()
        return gradients(model)

    wanted, got = both(program, f"fp16-nomaster:initial={initial}")
    assert_close(got, wanted, "fp16")


def test_naive_is_half_while_on_and_fp32_after():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    rounded = {k: v.half() for k, v in model.state_dict().items() if v.is_floating_point()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    switch = halfstep.switch(model, optimizer, "fp16-naive")
    for k, v in model.state_dict().items():
        if k in rounded:
            assert v.dtype == torch.float16
            assert torch.equal(v, rounded[k])
    assert switch.loss_scale == 1.0
    mse(model).backward()
    optimizer.step()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float16}
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == torch.float16
    assert switch.last_step.applied
    switch.off()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == torch.float32
    assert model[1].running_mean.dtype == torch.float32
    assert all(on_grid(p) for p in model.parameters())
    mse(model).backward()
    optimizer.step()


def test_naive_with_adams_eps_is_nan_at_the_first_update_as_in_torch_and_raises_nothing():
    """1e-8 is 0 in FP16, and so is the square of a small gradient: 0 / 0."""

    def nan_weights(model, optimizer, x, y):
        (2.0**-9 * mse(model, x, y)).backward()
        optimizer.step()
        return {k: p.isnan() for k, p in model.named_parameters()}

    plain = mlp().half()
    expected = nan_weights(plain, torch.optim.Adam(plain.parameters()), X.half(), Y)
    assert sum(int(n.sum()) for n in expected.values()) > 0
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    switch = halfstep.switch(model, optimizer, "fp16-naive")
    got = nan_weights(model, optimizer, X, Y)
    assert switch.last_step.applied
    assert got.keys() == expected.keys()
    agree = sum(int((got[k] == expected[k]).sum()) for k in got)
    assert agree >= 0.95 * sum(n.numel() for n in got.values())
    optimizer.zero_grad()
    mse(model).backward()  # it goes on as a plain program does: silently
    optimizer.step()
    assert switch.last_step.applied


def brute_force(x, weight, bias):
    """``x @ weight.T + bias`` in FP16, every sum rounded after every product."""
    out = torch.zeros(x.size(0), weight.size(0), dtype=torch.float64)
    for k in range(x.size(1)):
        product = x[:, k].half().double().unsqueeze(1) * weight[:, k].half().double()
        out = (out + product).half().double()
    return (out + bias.half().double()).half().float()


def test_acc16_is_a_loop_that_rounds_every_sum():
    torch.manual_seed(0)
    model = nn.Linear(300, 5)
    x = torch.randn(3, 300)
    expected = brute_force(x, model.weight.detach(), model.bias.detach())
    halfstep.switch(model, sgd(model), "fp16-acc16")
    assert torch.equal(model(x), expected)


def test_acc16_gradients_are_sums_over_the_batch_in_fp16():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    x = torch.rand(500, 3)
    halfstep.switch(model, sgd(model), "fp16-acc16:initial=1")
    model(x).sum().backward()
    total = torch.zeros(3, dtype=torch.float64)
    for row in x.half().double():
        total = (total + row).half().double()
    assert torch.equal(model.weight.grad, total.float().expand(2, 3))
    exact = x.half().double().sum(0)
    assert (total - exact).abs().max() > 1e-3 * exact.max(), "such a sum drifts"


def test_acc16_differs_from_fp16_and_errs_more():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(600, 16), nn.Tanh(), nn.Linear(16, 4))

    torch.manual_seed(1)
    x = torch.randn(8, 600)

    def program(model, optimizer, switch):
        out = model(x)
        (out - Y).square().mean().backward()
        return torch.cat([g.flatten() for g in gradients(model).values()])

    wanted, kept = both(program, "fp16:initial=1024", make)
    _, drifted = both(program, "fp16-acc16:initial=1024", make)
    assert_close(kept, wanted, "fp16")
    assert (drifted - wanted).norm() > 2 * (kept - wanted).norm()


def test_acc16_uses_ops_own_accumulator():
    torch.manual_seed(0)
    a, b = torch.randn(4, 70).half().float(), torch.randn(3, 70).half().float()
    got = ops.multiply(a, b.t(), Accumulator.parse("fp16"))
    assert torch.equal(got.half().float(), brute_force(a, b, torch.zeros(3)))


@pytest.mark.parametrize(
    ("recipe", "right"),
    [
        ("fp16-acc16", 2048.0),
        ("fp16-acc16-chunk64", 4096.0),
        ("fp16-acc16-pairwise", 4096.0),
        ("fp16:accumulate=v100", 4096.0),
        ("bf16", 4096.0),
        ("bf16:accumulate=bf16", 256.0),
        ("bf16:accumulate=bf16/chunk64", 4096.0),
    ],
)
def test_a_long_sum_swamps_or_not_as_the_accumulator_has_it(recipe: str, right: float):
    """4096 ones: forward, and over the batch in the gradient of the weight."""
    for model, x in (
        (nn.Linear(4096, 1, bias=False), torch.ones(1, 4096)),
        (nn.Linear(1, 1, bias=False), torch.ones(4096, 1)),
    ):
        nn.init.ones_(model.weight)
        halfstep.switch(model, sgd(model), recipe + ("," if ":" in recipe else ":") + "initial=1")
        out = model(x)
        out.sum().backward()
        assert max(out[0, 0].item(), model.weight.grad[0, 0].item()) == right


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv2d(4, 6, 3, padding="same"),
    nn.Conv3d(4, 6, 2, dilation=2),
    nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.ConvTranspose3d(4, 6, 2, stride=2),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("recipe", ["fp16-acc16", "fp16-acc16-chunk64"])
def test_every_convolution_runs_in_the_accumulator(layer: nn.Module, recipe: str):
    """Integers whose sums are exact: the result is FP32's, rounded once, forward and backward."""
    generator = torch.Generator().manual_seed(3)
    model = copy.deepcopy(layer)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-3, 4, p.shape, generator=generator))
    dims = model.weight.dim() - 2
    x = torch.randint(-3, 4, (2, 4, *[6] * dims), generator=generator).float().requires_grad_()
    right = model(x)
    wanted = torch.autograd.grad(right.sum(), [x, *model.parameters()])
    halfstep.switch(model, sgd(model), recipe + ":initial=1")
    out = model(x)
    assert torch.equal(out, right)
    out.sum().backward()
    for got, want in zip([x.grad, *[p.grad for p in model.parameters()]], wanted, strict=True):
        assert torch.equal(got, want)
