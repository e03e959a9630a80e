"""What comes after the switch: modules and parameters added or replaced, and leaks that begin late."""

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import PER_LAYER, assert_close, batch, both, gradients, mlp, sgd
from halfstep.errors import SwitchError

X, Y = batch()
RECIPE = "fp16:initial=8192"


class Net(nn.Module):
    """A model around a model."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x)


class Featured(Net):
    def forward(self, x):
        self.feature = self.net[:2](x)
        return self.net[2:](self.feature)


def mse(out):
    return (out - Y).square().mean()


# -- modules and parameters that come later ------------------------------------------------------------


def add_attribute(model):
    model.head = nn.Linear(4, 4)


def add_module(model):
    model.add_module("head", nn.Linear(4, 4))


def append(model):
    model.net.append(nn.Linear(4, 4))


def insert(model):
    model.net.insert(2, nn.Linear(16, 16))


def set_item(model):
    model.net[4] = nn.Linear(16, 4)


def replace_weight(model):
    model.net[2].weight = nn.Parameter(0.5 * model.net[2].weight.detach())


def register_again(model):
    old = model.net[2].weight.detach().clone()
    del model.net[2].weight
    model.net[2].register_parameter("weight", nn.Parameter(2.0 * old))


def remove_and_add(model):
    del model.net[4]
    model.net.append(nn.Linear(16, 4))


def list_append(model):
    model.layers.append(nn.Linear(4, 4))


def new_parameter(model):
    model.gain = nn.Parameter(torch.full((4,), 1.5))


def in_data(model):
    model.net[0].weight.data = 0.5 * model.net[0].weight.data


class Growing(Net):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        x = self.net(x)
        for layer in self.layers:
            x = layer(x)
        head, gain = getattr(self, "head", None), getattr(self, "gain", None)
        x = x if head is None else head(x)
        return x if gain is None else x * gain


@pytest.mark.parametrize("calls", [1, 5, 9])
@pytest.mark.parametrize(
    "change",
    [
        add_attribute,
        add_module,
        append,
        insert,
        set_item,
        replace_weight,
        register_again,
        remove_and_add,
        list_append,
        new_parameter,
        in_data,
    ],
)
def test_what_is_added_or_replaced_later_takes_part(change, calls):
    def program(model, optimizer, switch):
        for _ in range(calls):
            mse(model(X)).backward()
        model.zero_grad()
        torch.manual_seed(5)
        change(model)
        mse(model(X)).backward()
        return gradients(model)

    for recipe in ("bf16", RECIPE):
        wanted, got = both(program, recipe, Growing)
        assert_close(got, wanted, recipe, 4 * PER_LAYER)


def test_a_module_made_inside_forward_is_right_in_that_forward_and_after():
    class Late(Net):
        def forward(self, x):
            if not hasattr(self, "head"):
                self.head = nn.Linear(4, 4)
            return self.head(self.net(x))

    model = Late()
    optimizer = sgd(model)
    halfstep.switch(model, optimizer, RECIPE)
    for _ in range(2):
        mse(model(X)).backward()
        assert 0.01 < model.head.weight.grad.norm() < 10
        model.head.weight.grad = None


def test_a_model_that_has_no_shapes_yet_is_refused_and_left_as_it_was():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh())
    optimizer = sgd(model)
    text = r"parameter 0\.weight has no shape yet: run the model once on a batch"
    with pytest.raises(SwitchError, match=text):
        halfstep.switch(model, optimizer, RECIPE)
    model(X)
    halfstep.switch(model, optimizer, RECIPE)
    mse(model(X)).backward()
    assert model[0].weight.grad.norm() < 100


# -- leaks that begin late -----------------------------------------------------------------------------


class Late(Net):
    """Does something else from call ``after`` on."""

    after = 0
    calls = 0

    def late(self):
        self.calls += 1
        return self.calls > self.after


class LateParameter(Late):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Parameter(torch.ones(4))]

    def forward(self, x):
        out = self.net(x)
        return out * self.hidden[0] if self.late() else out


class LateSwap(Late):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.hidden = [nn.Parameter(torch.ones(4))]

    def forward(self, x):
        return self.net(x) * (self.hidden[0] if self.late() else self.gain)


@pytest.mark.parametrize("after", [5, 17, 40])
@pytest.mark.parametrize("make", [LateParameter, LateSwap])
def test_a_leak_that_begins_late_is_mended_from_the_call_on_in_which_it_begins(make, after):
    model = make()
    model.after = after
    halfstep.switch(model, sgd(model), RECIPE)
    for _ in range(after):
        model(X)
    for _ in range(5):
        model.hidden[0].grad = None
        mse(model(X)).backward()
        assert 0.01 < model.hidden[0].grad.norm() < 10


@pytest.mark.parametrize("after", [5, 17, 40])
def test_a_captured_activation_that_is_used_late_is_right_in_the_backward_in_which_it_is(after):
    def program(model, optimizer, switch):
        for _ in range(after):
            mse(model(X)).backward()
        model.zero_grad()
        out = model(X)
        (mse(out) + model.feature.float().square().mean()).backward()
        return gradients(model)

    wanted, got = both(program, RECIPE, Featured)
    assert_close(got, wanted, RECIPE)


# -- weights that are written between a step and the next forward --------------------------------------


def swap_data(p, new):
    p.data = new


def write_to_memory(p, new):
    p.detach().numpy()[...] = new.numpy()


@pytest.mark.parametrize("recipe", ["bf16", RECIPE])
@pytest.mark.parametrize(
    "write",
    [lambda p, new: p.data.copy_(new), swap_data, write_to_memory],
    ids=["data", "swap", "numpy"],
)
def test_a_write_that_no_version_counts_is_in_the_next_forward(recipe, write):
    """Averages and targets are swapped in like this: no working copy may outlive its master (decision 54)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    halfstep.switch(model, optimizer, recipe=recipe)
    x = torch.randn(8, 256)
    model(x).square().mean().backward()
    optimizer.step()
    fresh = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))
    stale = model(x)
    versions = [p._version for p in model.parameters()]
    for p, new in zip(model.parameters(), fresh.parameters(), strict=True):
        write(p, new.detach())
    if write is not swap_data:
        assert [p._version for p in model.parameters()] == versions
    halfstep.switch(fresh, torch.optim.AdamW(fresh.parameters()), recipe=recipe)
    out = model(x)
    assert torch.equal(out, fresh(x))
    assert not torch.equal(out, stale)
