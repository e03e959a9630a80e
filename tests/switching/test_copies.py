"""Copies of a switched model are unswitched: FP32, independent, picklable; and state dicts at any time."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twins import RECIPES, check, on

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.scaled = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index):
        return self.head(self.scaled(self.norm(self.rnn(self.table(index))[0])))


INDEX = torch.arange(12).view(3, 4) % 10


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(INDEX).square().mean().backward()
        optimizer.step()


def fp32_twin(model):
    twin = Net()
    twin.load_state_dict(model.state_dict())
    return twin


def assert_unswitched(copied, model):
    """It gives what a fresh FP32 model with its weights gives, and does not share its weights."""
    twin = fp32_twin(copied)
    assert torch.equal(copied(INDEX), twin(INDEX))
    mine = {id(p) for p in model.parameters()}
    for module in copied.modules():
        assert type(module._parameters) is dict
        for p in module._parameters.values():
            assert p is None or (p.dtype == torch.float32 and id(p) not in mine)
    assert copied.head.weight is copied.table.weight
    before = [p.detach().clone() for p in model.parameters()]
    train(copied, torch.optim.SGD(copied.parameters(), lr=0.5))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert copied.rnn._flat_weights[0] is copied.rnn.weight_ih_l0


@pytest.fixture
def model(recipe):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    on(model, recipe, optimizer)
    train(model, optimizer)
    return model


def test_deepcopy(recipe, model):
    out = model(INDEX)
    copied = copy.deepcopy(model)
    assert_unswitched(copied, model)
    assert torch.equal(model(INDEX), out)
    assert not torch.equal(copied(INDEX), out)


def test_deepcopy_of_parametrized_modules(recipe):
    """torch gives them a class and a copy method of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)),
    )
    on(model, recipe)
    x = torch.randn(3, 6)
    out = model(x)
    copied = copy.deepcopy(model)
    expected = x
    for layer in copied:
        assert type(layer._parameters) is dict
        expected = nn.functional.linear(expected, layer.weight, layer.bias)
    assert torch.equal(copied(x), expected)
    assert not torch.equal(copied(x), out)
    assert torch.equal(model(x), out)


def test_deepcopy_of_a_part(recipe, model):
    part = copy.deepcopy(model.scaled)
    assert type(part.bias) is nn.Parameter
    x = torch.randn(2, 6)
    assert torch.equal(part(x), nn.functional.linear(x, part.weight, part.bias))


def test_a_copy_can_be_switched_by_itself(recipe, model):
    copied = copy.deepcopy(model)
    out = model(INDEX)
    switch = on(copied, recipe)
    assert torch.equal(copied(INDEX), out)
    switch.off()
    assert torch.equal(model(INDEX), out)
    assert_unswitched(copied, model)


def test_a_copy_outlives_off(recipe, model):
    copied = copy.deepcopy(model)
    model.__dict__["_call_impl"].owners[0].off()
    assert_unswitched(copied, model)


def test_torch_save_of_a_whole_model(recipe, model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_unswitched(torch.load(file, weights_only=False), model)


def test_pickle(recipe, model):
    text = pickle.dumps(model)
    assert b"halfstep" not in text, "a saved model must load where halfstep is not installed"
    assert_unswitched(pickle.loads(text), model)


def test_pickle_of_a_copy(recipe, model):
    assert_unswitched(pickle.loads(pickle.dumps(copy.deepcopy(model))), model)


def test_deepcopy_inside_forward_is_of_the_masters(recipe):
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.copied = []

        def forward(self, x):
            out = self.body(x)
            self.copied.append(copy.deepcopy(self.body))
            return out

    model = Copies()
    on(model, recipe)
    x = torch.randn(2, 4)
    model(x)
    (copied,) = model.copied
    assert torch.equal(copied.weight, model.body.weight)
    assert copied.weight.dtype == torch.float32
    assert copied.weight.is_leaf
    assert torch.equal(copied(x), nn.functional.linear(x, copied.weight, copied.bias))


@pytest.mark.parametrize("ema", [True, False])
def test_averaged_models(recipe, ema):
    def averaged(which):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        on(model, which, optimizer)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if ema else None)
        masters = []
        for _ in range(3):
            train(model, optimizer, 1)
            average.update_parameters(model)
            masters.append(model.rnn.weight_ih_l0.detach().clone())
        expected = masters[0]
        for k, m in enumerate(masters[1:], 1):
            expected = expected + (m - expected) * (0.5 if ema else 1 / (k + 1))
        torch.testing.assert_close(average.module.rnn.weight_ih_l0, expected, rtol=1e-6, atol=1e-7)
        return average

    average = averaged(recipe)
    assert torch.equal(average(INDEX), fp32_twin(average.module)(INDEX))
    assert average.module.head.weight.dtype == torch.float32


# -- state dicts ------------------------------------------------------------------------------------


class Reads(nn.Module):
    """Takes its own state in the middle of forward."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.rnn = nn.GRU(4, 4)
        self.seen = []

    def forward(self, x):
        h = self.norm(self.body(x))
        state = {k: v.clone() for k, v in self.state_dict().items()}
        named = {k: v.detach().clone() for k, v in self.named_parameters()}
        self.seen.append((state, named))
        return self.rnn(h)[0]


def test_state_dict_before_inside_and_after(recipe):
    torch.manual_seed(0)
    model = Reads()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {k: type(v) for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = on(model, recipe, optimizer)

    def same(state):
        assert list(state) == list(before)
        for k, v in state.items():
            assert v.dtype == before[k].dtype
            if "running" not in k and "tracked" not in k:
                assert torch.equal(v, before[k]), k

    same(model.state_dict())
    out = model(torch.randn(3, 4))
    state, named = model.seen.pop()
    same(state)
    same(state | named)
    same(model.state_dict())
    assert {k: type(v) for k, v in model.state_dict().items()} == kinds
    out.square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[k], p) for k, p in model.named_parameters())
    assert not torch.equal(after["body.weight"], before["body.weight"])
    switch.off()
    assert list(model.state_dict()) == list(before)
    fresh = Reads()
    fresh.load_state_dict(after)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_while_on(recipe, assign):
    torch.manual_seed(1)
    other = Net()
    model = Net()
    switch = on(model, recipe)
    model(INDEX)
    model.load_state_dict(other.state_dict(), assign=assign)
    if assign:  # torch unties assigned weights, in FP32 too
        model.head.weight = model.table.weight
    twin = fp32_twin(other)
    on(twin, recipe)
    assert torch.equal(model(INDEX), twin(INDEX))
    model(INDEX).square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    switch.off()
    assert torch.equal(model(INDEX), other(INDEX))


def test_a_part_is_loaded_while_on(recipe):
    def call(model, x):
        model(x)
        torch.manual_seed(5)
        model[0].load_state_dict(nn.Linear(4, 4).state_dict())
        return model(x)

    make = lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))  # noqa: E731
    check(make, lambda: torch.randn(2, 4), recipe, k=4, call=call)
