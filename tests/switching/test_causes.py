"""Why a step failed, by running it again: the cause, the operation, the operand, the place in the batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfstep
from against_fp32 import sgd
from halfstep.errors import NonFiniteError


class Net(nn.Module):
    """Three layers; what is between them is given."""

    def __init__(self, middle=lambda h: h):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.last = nn.Linear(8, 2)
        self.middle = middle

    def forward(self, x):
        return self.last(self.middle(self.second(torch.tanh(self.first(x)))))


X = torch.linspace(-1, 1, 24).reshape(6, 4)


def fail(model, recipe, steps=1, loss=lambda out: out.square().mean(), xs=(X,)):
    """The error of the last of so many steps, and the switch."""
    optimizer = sgd(model, lr=1e-3)
    switch = halfstep.switch(model, optimizer, recipe)
    for _ in range(steps - 1):
        optimizer.zero_grad()
        loss(model(X)).backward()
        optimizer.step()
    optimizer.zero_grad()
    for x in xs:
        loss(model(x)).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step()
    for k, v in model.state_dict().items():
        assert torch.equal(v.nan_to_num(), before[k].nan_to_num())
    return caught.value, switch


def test_a_forward_that_overflows_names_the_layer_the_operation_and_the_row():
    model = Net()
    with torch.no_grad():
        model.second.weight.fill_(30000.0)
    x = torch.zeros(6, 4)
    x[4] = 1.0
    with torch.no_grad():
        model.first.bias.zero_()
        model.first.weight.fill_(1.0)
    error, switch = fail(model, "fp16", xs=(x,))
    found = error.finding
    assert (found.phase, found.module, found.operand, found.index) == (
        "forward",
        "second",
        "weight",
        4,
    )
    assert found.remedies == {"fp32": True, "bf16": True, "a loss scale of 64": False}
    assert "forward of second: " in str(error)
    assert "operand weight, batch index 4. It made inf in float16 of finite numbers" in str(error)
    assert "with fp32 or bf16 it is finite, with a loss scale of 64 it is not" in str(error)
    assert switch.loss_scale == 65536.0, "not the scale's doing"


def test_a_forward_overflow_that_the_loss_does_not_show_does_not_run_the_scale_down():
    class Hidden(Net):
        def forward(self, x):
            h = self.second(torch.tanh(self.first(x)))
            return self.last(h / (1 + h.abs() * 1e30)) * 0 + self.last(torch.tanh(h) * 1e-3)

    model = Hidden(lambda h: h)
    with torch.no_grad():
        model.second.weight.mul_(1e6)
    optimizer = sgd(model, lr=1e-3)
    switch = halfstep.switch(model, optimizer, "fp16")
    with pytest.raises(NonFiniteError) as caught:
        for _ in range(20):
            optimizer.zero_grad()
            model(X).nan_to_num(0.0).square().mean().backward()
            optimizer.step()
    assert caught.value.finding.phase == "forward"
    assert caught.value.finding.module == "second"
    assert switch.loss_scale >= 65536.0 / 16


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
def test_nan_in_the_data_names_the_input_and_the_row(recipe):
    x = X.clone()
    x[3, 1] = torch.nan
    error, _ = fail(Net(), recipe, xs=(x,))
    found = error.finding
    assert (found.phase, found.operand, found.index) == ("data", "input 0", 3)
    assert "data, operand input 0, batch index 3" in str(error)
    assert "no format and no scale mends that" in str(error)


def test_the_micro_batch_is_named():
    x = X.clone()
    x[5, 0] = torch.inf
    error, _ = fail(Net(), "bf16", xs=(X, X, x, X))
    assert error.finding.batch == (2, 4)
    assert "batch index 5, micro-batch 3 of 4" in str(error)


def test_a_loss_function_that_makes_nan():
    error, _ = fail(Net(), "bf16", loss=lambda out: (out.sum(0) * 0).sqrt().sum() + out.sum() * 0)
    found = error.finding
    assert (found.phase, found.operand) == ("loss", "gradient of output 0")
    assert "the gradient that the loss function gave for them is not" in str(error)


def test_a_weight_that_is_bad_already():
    model = Net()
    with torch.no_grad():
        model.second.bias[1] = torch.nan
    error, _ = fail(model, "bf16")
    assert (error.finding.phase, error.finding.operand) == ("weights", "second.bias")


def test_a_backward_that_overflows_at_the_floor():
    model = Net()
    error, _ = fail(model, "fp16:initial=1", loss=lambda out: (out * 1e7).mean())
    found = error.finding
    assert found.phase == "backward"
    assert found.operand == "grad"
    assert found.remedies["fp32"]
    assert found.remedies["bf16"]
    assert "a smaller" not in str(error)


def test_a_backward_that_a_smaller_scale_mends():
    error, _ = fail(Net(), "fp16:scaling=static,initial=16777216", loss=lambda out: out.mean())
    assert error.finding.phase == "backward"
    assert error.finding.remedies == {"fp32": True, "bf16": True, "a loss scale of 16384": True}


def test_producer_and_not_propagator():
    model = Net(lambda h: torch.log(h * 0 - 1.0))
    error, _ = fail(model, "bf16")
    found = error.finding
    assert (found.phase, found.module, found.operation) == ("forward", "", "log")
    assert found.remedies == {"fp32": False, "a loss scale of 0.000976562": False}


def test_a_gradient_that_was_written_to_is_told_apart():
    model = Net()
    optimizer = sgd(model)
    halfstep.switch(model, optimizer, "bf16")
    model(X).sum().backward()
    model.last.bias.grad[0] = torch.inf
    with pytest.raises(NonFiniteError, match="changed after the backward") as caught:
        optimizer.step()
    assert caught.value.finding.phase == "unknown"


def test_masks_of_infinities_are_no_culprits():
    class Masked(Net):
        def forward(self, x):
            h = self.second(torch.tanh(self.first(x)))
            mask = torch.triu(torch.full((8, 8), float("-inf")), 1)
            p = torch.softmax(h.unsqueeze(-1) + mask, -1) @ h.unsqueeze(-1)
            return self.last(F.dropout(p.squeeze(-1), 0.5) * 60000.0 * 60000.0)

    error, _ = fail(Masked(), "fp16")
    assert error.finding.operation.startswith("mul")


def test_nothing_is_changed_by_running_again():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizer = sgd(model)
    halfstep.switch(model, optimizer, "bf16")
    model(X).sum().backward()
    model[3].bias.grad[0] = torch.inf
    grads = [p.grad.clone() for p in model.parameters()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(NonFiniteError):
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), random)
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k])
    for p, g in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g)
    assert not nn.modules.module._global_forward_hooks


def test_dropout_is_drawn_as_it_was():
    """The mask that made the overflow is drawn again: else the row would differ in most of 20 runs."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Dropout(0.7), nn.Linear(4, 1, bias=False), nn.Linear(1, 1))
        with torch.no_grad():
            model[1].weight.fill_(30000.0)
        optimizer = sgd(model)
        switch = halfstep.switch(model, optimizer, "fp16")
        seen = []
        handle = model[1].register_forward_hook(lambda m, i, o, s=seen: s.append(o.detach()))
        model(torch.ones(6, 4)).square().mean().backward()
        handle.remove()
        bad = (~torch.isfinite(seen[0])).flatten().nonzero()
        if len(bad):
            with pytest.raises(NonFiniteError) as caught:
                optimizer.step()
            assert caught.value.finding.index == int(bad[0])
        switch.off()


def test_what_is_kept_is_gone_with_the_next_step_and_bounded():
    import weakref

    model = Net()
    optimizer = sgd(model, lr=1e-3)
    switch = halfstep.switch(model, optimizer, "bf16")
    alive = []
    for _ in range(5):
        for _ in range(2):
            x = X.clone()
            alive.append(weakref.ref(x))
            model(x).square().mean().backward()
            del x
        optimizer.step()
        optimizer.zero_grad()
        assert sum(ref() is not None for ref in alive) <= 2
    for _ in range(100):
        model(X.clone()).square().mean().backward()
    assert len(switch.recorder.calls()) <= 64
    with torch.no_grad():
        model(X)
    switch.off()
    assert not switch.recorder.calls()


def test_impossible_paths_of_a_ctc_loss_are_not_to_blame():
    class Recogniser(Net):
        def forward(self, x):
            spoken = (
                super().forward(x).unsqueeze(1).log_softmax(-1)
            )  # 6 steps of one sound, 2 signs
            return (
                F.ctc_loss(spoken, torch.tensor([[1]]), torch.tensor([6]), torch.tensor([1])) * 2e3
            )

    model = Recogniser()
    optimizer = sgd(model, lr=1e-3)
    switch = halfstep.switch(model, optimizer, "fp16")
    for _ in range(30):
        optimizer.zero_grad()
        model(X).backward()
        optimizer.step()
    assert 0 < switch.skipped_steps < 29 and switch.last_step.applied


def penalised(model, x):
    """The loss of a critic with a gradient penalty: gradients of 1, which FP16 cannot hold times 2^16."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return model(x).mean() + (g.norm(dim=1) - 1).square().mean()


def adversarial(model, x):
    """A loss on inputs that were moved along their gradient."""
    x = x.clone().requires_grad_()
    (10 * model(x).sum()).backward()
    moved = x.detach() + 0.1 * x.grad / x.grad.norm(dim=1, keepdim=True)
    model.zero_grad()
    return model(moved).square().mean()


@pytest.mark.parametrize("loss", [penalised, adversarial])
def test_a_loss_made_of_gradients_that_the_scale_made_inf_lowers_the_scale(loss):
    model = Net()
    optimizer = sgd(model, lr=1e-2)
    switch = halfstep.switch(model, optimizer, "fp16")
    before = copy.deepcopy(model.state_dict())
    reports = []
    switch.on_step(reports.append)
    for _ in range(12):
        optimizer.zero_grad()
        loss(model, X).backward()
        optimizer.step()
        if not switch.last_step.applied:
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    skipped = [r.applied for r in reports].index(True)
    assert 1 <= skipped < 8
    assert all(r.applied for r in reports[skipped:])
    assert switch.loss_scale == 2.0 ** (16 - skipped)


def test_a_loss_made_of_gradients_is_an_error_at_once_where_the_data_is_to_blame():
    model = Net()
    optimizer = sgd(model, lr=1e-2)
    halfstep.switch(model, optimizer, "fp16:initial=16")
    x = X.clone()
    x[2, 1] = torch.nan
    penalised(model, x).backward()
    with pytest.raises(NonFiniteError, match="what forward was given is not finite"):
        optimizer.step()


def test_a_row_that_is_masked_as_a_whole_is_named():
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[4] = True
    error, _ = fail(Net(lambda h: h.masked_fill(mask, float("-inf")).softmax(-1)), "fp16")
    found = error.finding
    assert (found.phase, found.operation, found.index) == ("forward", "_softmax", 4)
    assert found.operand == "input"
    assert "NaN in float32 of infinities" in found.detail


def test_a_masked_row_that_is_mended_is_no_culprit():
    def middle(h):
        p = h.masked_fill(torch.ones_like(h, dtype=torch.bool), float("-inf")).softmax(-1)
        return torch.log(p.nan_to_num(0.0)).nan_to_num(0.0, neginf=-1.0)

    error, _ = fail(Net(middle), "bf16", loss=lambda out: torch.log(out - out.max()).mean())
    assert "softmax" not in str(error)


class WritesNaN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[2] = float("nan")
        return grad


def test_a_backward_that_writes_nan_is_named():
    error, _ = fail(Net(WritesNaN.apply), "bf16")
    found = error.finding
    assert (found.phase, found.operation, found.index) == ("backward", "writesnan", 2)
    assert "of what it was told to write" in found.detail
    assert "changed after the backward" not in str(error)


def test_a_loss_function_whose_gradient_is_finite_is_named():
    error, _ = fail(Net(), "fp16", loss=lambda out: torch.log(out - out.max() - 1.0).mean())
    assert error.finding.phase == "loss"
    assert "the loss function made what is not of them" in str(error)
