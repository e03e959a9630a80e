"""Weights and optimizer state in fewer bits between steps: bits, bytes, and what training does."""

import copy

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import batch, mlp
from halfstep import ops
from halfstep.errors import SwitchError
from halfstep.ops import BlockTensor

X, Y = batch(n=32)


def mse(model):
    return (model(X) - Y).square().mean()


def steps(model, optimizer, n):
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = mse(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def on_bf16_grid(t):
    return torch.equal(t, t.bfloat16().float())


def test_pure_is_bfloat16_while_on_and_fp32_after():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    switch = halfstep.switch(model, optimizer, "bf16-pure")
    steps(model, optimizer, 2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert optimizer.state[model[0].weight]["exp_avg_sq"].dtype == torch.bfloat16
    switch.off()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert optimizer.state[model[0].weight]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize(
    ("recipe", "low", "high"),
    [
        ("bf16", 2.0 - 1e-6, 2.0 + 1e-6),
        ("bf16-pure", 1.0, 1.0),
        ("bf16:master=bf16", 1.0, 1.0),
        # 512 updates of 2^-9 on a grid of 2^-7: the mean of 64 weights is 2 with a deviation below
        # sqrt(512 * 2^-9 * 2^-7 / 64) = 0.011; 6 of them.
        ("bf16-sr", 2.0 - 0.066, 2.0 + 0.066),
        ("bf16-kahan", 2.0 - 2.0**-7, 2.0 + 2.0**-7),
    ],
)
def test_small_updates_are_lost_to_nearest_and_kept_by_chance_or_by_a_carry(recipe, low, high):
    torch.manual_seed(0)
    model = nn.Linear(64, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-9)
    halfstep.switch(model, optimizer, recipe)
    for _ in range(512):
        model.weight.grad = -torch.ones_like(model.weight)
        optimizer.step()
    assert low <= model.weight.float().mean().item() <= high
    assert on_bf16_grid(model.weight.float())


def test_kahan_is_the_textbook_loop():
    torch.manual_seed(0)
    model = nn.Linear(16, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-9)
    switch = halfstep.switch(model, optimizer, "bf16-kahan")
    w = model.weight.detach().double()
    carry = torch.zeros_like(w)
    for _ in range(20):
        grad = torch.randn(8, 16).bfloat16().float()
        model.weight.grad = grad.clone()
        optimizer.step()
        u = (w.float() - 2.0**-9 * grad).double() - w  # what FP32 SGD adds
        s = (w + (u + carry)).bfloat16().double()
        carry = (u + carry - (s - w)).bfloat16().double()
        w = s
        assert torch.equal(model.weight.double(), w)
        assert torch.equal(switch._between.carry_of(model.weight).double(), carry)
    assert carry.abs().max() > 0


def test_stochastic_is_round_to_with_the_generator_of_seed_and_count():
    torch.manual_seed(5)
    model = nn.Linear(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, "bf16-sr")
    between = switch._between
    before_rng = torch.get_rng_state()
    for turn in range(3):
        grads = [torch.full_like(p, 0.3) for p in model.parameters()]
        exact = [p.detach() - torch.full_like(p, 0.3) * 0.1 for p in model.parameters()]
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        assert between.count == turn
        optimizer.step()
        generator = torch.Generator().manual_seed((5 + turn * 0x4F1BBCDCBFA53E0B) % 2**63)
        for p, e in zip(model.parameters(), exact, strict=True):
            near = ops.round_to(e, "bf16", "stochastic", generator=generator)
            # 0.3 * 0.1 and an FMA of it differ: a last bit of FP32
            assert (p == near).float().mean() > 0.97
    assert torch.equal(torch.get_rng_state(), before_rng), "the user's generator is left alone"


def trained(recipe, seed, n=12):
    model = mlp()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    halfstep.switch(model, optimizer, recipe)
    steps(model, optimizer, n)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_seed_of_torch_decides():
    assert torch.equal(trained("bf16-sr", 3), trained("bf16-sr", 3))
    assert not torch.equal(trained("bf16-sr", 3), trained("bf16-sr", 4))


MOMENTS = ["bf16", "fp16", "e5m2", "e6m9", "bf16@1x128", "e4m3fn@1x128", "mxfp8_e4m3"]


@pytest.mark.parametrize(
    "recipe", ["bf16-sr", "bf16-kahan", *[f"bf16-kahan:moments={m}" for m in MOMENTS]]
)
def test_resuming_is_bit_exact(recipe):
    def start(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
        return optimizer, halfstep.switch(model, optimizer, recipe)

    torch.manual_seed(0)
    model = mlp()
    optimizer, switch = start(model)
    steps(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), switch.state_dict()))
    steps(model, optimizer, 5)

    torch.manual_seed(77)
    again = mlp(seed=9)
    again_optimizer, again_switch = start(again)
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    again_switch.load_state_dict(saved[2])
    steps(again, again_optimizer, 5)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(switch._between.carry_of(a), again_switch._between.carry_of(b))
    kept = list(optimizer.state_dict()["state"].values())
    assert all(isinstance(v, torch.Tensor) for s in kept for v in s.values())


@pytest.mark.parametrize(
    ("moments", "bytes_each"),
    [
        ("bf16", 2),
        ("fp16", 2),
        ("e5m2", 1),
        ("e4m3fn@1x128", 1 + 4 / 128),
        ("mxfp8_e4m3", 1 + 1 / 32),
        ("e6m9", 4),  # torch has no such dtype
    ],
)
def test_moments_take_the_bytes_of_their_format(moments, bytes_each):
    model = nn.Linear(256, 32, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    switch = halfstep.switch(model, optimizer, f"bf16:moments={moments}")
    model(torch.randn(8, 256)).square().mean().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[key].nbytes == int(model.weight.numel() * bytes_each)
    assert state["step"].item() == 1.0
    assert state["step"].dtype == torch.float32
    switch.off()
    assert state["exp_avg"].dtype == torch.float32
    assert not optimizer._optimizer_state_dict_post_hooks


@pytest.mark.parametrize("recipe", ["bf16-sr", "bf16-kahan", "bf16:moments=e4m3fn@1x128"])
def test_a_skipped_step_leaves_weights_state_and_carries_as_they_are(recipe):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    switch = halfstep.switch(
        model,
        optimizer,
        f"{recipe},scaling=dynamic" if ":" in recipe else f"{recipe}:scaling=dynamic",
    )
    steps(model, optimizer, 3)
    before = copy.deepcopy(
        (model.state_dict(), optimizer.state_dict(), switch._between.state_dict(switch.names()))
    )
    kinds = [type(v) for s in optimizer.state.values() for v in s.values()]
    optimizer.zero_grad()
    mse(model).backward()
    model[0].bias.grad[0] = torch.inf
    optimizer.step()
    assert not switch.last_step.applied
    after = (model.state_dict(), optimizer.state_dict(), switch._between.state_dict(switch.names()))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert kinds == [type(v) for s in optimizer.state.values() for v in s.values()]
    assert any(k is BlockTensor for k in kinds) == ("@" in recipe)


@pytest.mark.parametrize(
    "recipe", ["bf16-sr", "bf16-kahan", *[f"bf16:moments={m}" for m in ["bf16", "e4m3fn@1x128"]]]
)
def test_losses_are_those_of_bf16(recipe):
    """The same program, seeds and batch: the mean loss of the last ten steps within a tenth."""

    def last(recipe):
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        halfstep.switch(model, optimizer, recipe)
        return sum(steps(model, optimizer, 150)[-10:]) / 10

    wanted = last("bf16")
    assert abs(last(recipe) - wanted) < 0.1 * wanted


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("bf16:update=kahan", "update=kahan needs an FP32 optimizer and weights in less"),
        ("bf16-pure:update=stochastic", "optimizer=bf16 and master=bf16. Say master=bf16"),
        ("bf16-pure:moments=bf16", "whose state is in bf16 already"),
        ("bf16:optimizer=fp16", "all three fp16 or all three bf16"),
    ],
)
def test_what_would_do_nothing_is_an_error(recipe, message):
    with pytest.raises(SwitchError, match=message):
        halfstep.switch(mlp(), None, recipe)


def test_a_carry_of_another_model_is_an_error():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, "bf16-kahan")
    steps(model, optimizer, 1)
    state = switch.state_dict()
    state["between_steps"]["carries"] = {"0.weight": torch.zeros(1)}
    with pytest.raises(
        SwitchError, match=r"carry of shape \(1,\) for 0.weight, and the model one of"
    ):
        switch.load_state_dict(state)
