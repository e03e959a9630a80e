"""The user's optimizer in one pass over memory: nothing about it is seen but its speed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.ops import native
from halfstep.switching.one_pass import step_in_one_pass

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason="no native kernels")
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "foreach": True},
    {"momentum": 0.5, "dampening": 0.5, "maximize": True, "lr": torch.tensor(0.1)},
]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 33), nn.Tanh(), nn.Linear(33, 5))


def train(m: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, begin: int = 0) -> None:
    for step in range(begin, begin + steps):
        x = torch.randn(16, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        m(x).square().mean().backward()
        optimizer.step()


def pair(kind, **options):
    """A model with an optimizer in one pass, and the same left to torch."""
    ours, theirs = model(), model()
    first, second = kind(ours.parameters(), **options), kind(theirs.parameters(), **options)
    step_in_one_pass(first)
    return ours, first, theirs, second


def flat(m: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(m.parameters()).detach()


@pytest.mark.skipif(not FUSES, reason="torch's kernels here have no fused multiply-add")
@pytest.mark.parametrize("options", SGD)
def test_sgd_is_torchs_to_the_bit(options):
    ours, first, theirs, second = pair(torch.optim.SGD, **{"lr": 0.1, **options})
    train(ours, first)
    train(theirs, second)
    assert torch.equal(flat(ours), flat(theirs))
    a, b = first.state_dict(), second.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for index, state in b["state"].items():
        assert a["state"][index].keys() == state.keys()
        assert all(
            torch.equal(a["state"][index][key], state[key])
            for key in state
            if state[key] is not None
        )


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"lr": 1e-2}])
def test_adam_is_torchs_and_its_state_too(kind, options):
    """A weight is off by a unit in the last place or two a step; gradients follow it."""
    ours, first, theirs, second = pair(kind, **options)
    train(ours, first)
    train(theirs, second)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-5, atol=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        a, b = first.state[p], second.state[q]
        assert list(a) == list(b)
        assert a["step"].item() == b["step"].item() == 4
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-4, atol=1e-7)
    fresh = model()
    other = kind(fresh.parameters())
    other.load_state_dict(first.state_dict())  # into torch's own, and on
    train(fresh, other)


class Own(torch.optim.Adam):
    """Not exactly torch's."""


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Own, {}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.SGD, {"lr": 0.1, "fused": True}),
        (torch.optim.RMSprop, {}),
        (
            torch.optim.Adam,
            {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "lr": torch.tensor(0.1)},
        ),
    ],
)
def test_what_is_left_to_torch_is_torchs_to_the_bit(kind, options):
    ours, first, theirs, second = pair(kind, **options)
    train(ours, first)
    train(theirs, second)
    assert torch.equal(flat(ours), flat(theirs))


def test_parameters_that_do_not_fit_are_left_to_torch_one_by_one():
    """One in float64, one whose gradient lies in another order, one without a gradient, one empty."""
    results = []
    for quick in (True, False):
        torch.manual_seed(1)
        parameters = [
            nn.Parameter(torch.randn(4, 5)),
            nn.Parameter(torch.randn(4, 5).double()),
            nn.Parameter(torch.randn(4, 5)),
            nn.Parameter(torch.randn(3)),
            nn.Parameter(torch.empty(0)),
        ]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        if quick:
            step_in_one_pass(optimizer)
        for step in range(3):
            for k, p in enumerate(parameters):
                p.grad = None if k == 3 and step == 0 else torch.ones_like(p) * (k + step)
            parameters[2].grad = torch.ones(5, 4).mT
            optimizer.step()
        results.append([p.detach() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_hooks_closures_schedulers_and_groups_go_on():
    m = model()
    optimizer = torch.optim.AdamW(
        [{"params": m[0].parameters(), "lr": 0.5}, {"params": m[2].parameters()}], lr=0.1
    )
    switch = halfstep.switch(m, optimizer, "bf16")
    assert "_init_group" in optimizer.__dict__
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    # A hook registered after the switch changes gradients: the step takes them as it left them.
    optimizer.register_step_pre_hook(lambda *_: [p.grad.zero_() for p in m.parameters()] and None)
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    before = flat(m).clone()
    optimizer.param_groups[0]["weight_decay"] = optimizer.param_groups[1]["weight_decay"] = 0.0
    train(m, optimizer, 1)
    assert torch.equal(flat(m), before)
    assert seen == ["before", "after"]
    schedule.step()

    def closure():
        optimizer.zero_grad()
        loss = m(torch.ones(2, 9)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).isfinite()
    assert torch.equal(flat(m), before)  # the learning rate is 0
    assert switch.last_step.applied
    state = optimizer.state[next(iter(m.parameters()))]
    assert state["step"].item() == 2
    clone = copy.deepcopy(optimizer)
    assert "_init_group" not in clone.__dict__
    switch.off()
    assert "_init_group" not in optimizer.__dict__


def test_a_skipped_step_leaves_everything_and_fp32_is_left_to_torch():
    m = model()
    optimizer = torch.optim.Adam(m.parameters())
    switch = halfstep.switch(m, optimizer, "fp16")
    train(m, optimizer, 12)  # until the loss scale fits
    assert switch.last_step.applied
    before, state = flat(m).clone(), copy.deepcopy(optimizer.state_dict()["state"])
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    m[0].bias.grad[3] = torch.inf
    optimizer.step()
    assert not switch.last_step.applied
    assert switch.last_step.nonfinite == {"0.bias": 1}
    assert torch.equal(flat(m), before)
    for index, kept in optimizer.state_dict()["state"].items():
        assert all(torch.equal(kept[key], state[index][key]) for key in kept)
    switch.off()
    halfstep.switch(m, optimizer, "fp32")
    assert "_init_group" not in optimizer.__dict__


def test_a_dispatch_mode_sees_torchs_operations():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    ours, first, _, _ = pair(torch.optim.SGD, lr=0.1)
    ours(torch.ones(1, 9)).sum().backward()
    with Names():
        first.step()
    assert "add_" in seen
