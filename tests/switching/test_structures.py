"""What goes into a model and comes out of it: nested containers, their types, dtypes that are no FP32."""

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from twins import RECIPES, check, objective, on, run

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Plain:
    logits: Tensor
    hidden: Tensor | None = None
    name: str = "plain"


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    hidden: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    logits: Tensor
    count: int = 3


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As in the large model libraries: an ordered dict whose fields are attributes too."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Gives(nn.Module):
    """A small net that packs its two results by ``pack``."""

    def __init__(self, pack):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.pack = pack

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.pack(self.head(hidden), hidden)


PACKS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b, "n": 3, "none": None, "text": "x"},
    "nested": lambda a, b: ({"x": [a, (b, None)]}, "text", 3, True),
    "namedtuple": Pair,
    "dataclass": Plain,
    "frozen dataclass": Frozen,
    "slotted frozen dataclass": lambda a, b: (Slotted(a), b),
    "dataclass with a nested one": lambda a, b: Frozen(a, [Plain(b)]),
    "ordered dict": lambda a, b: collections.OrderedDict(a=a, b=b),
    "default dict": lambda a, b: collections.defaultdict(list, a=a, b=b),
    "model output": Output,
    "return types": lambda a, b: (a.max(0), b),
}


@pytest.mark.parametrize("pack", PACKS)
def test_every_container_comes_out_whole_and_in_fp32(recipe, pack):
    low, _ = check(lambda: Gives(PACKS[pack]), lambda: torch.randn(5, 6), recipe, k=6)
    assert all(t.dtype == torch.float32 for t in low.outputs)
    out = low.model(torch.randn(5, 6))
    assert type(out) is type(PACKS[pack](torch.ones(2, 2), torch.ones(2, 2)))


def test_fields_that_are_no_tensors_pass(recipe):
    model = Gives(lambda a, b: Plain(a, None, "name"))
    on(model, recipe)
    out = model(torch.randn(5, 6))
    assert (out.hidden, out.name) == (None, "name")
    assert out.logits.dtype == torch.float32


def test_attributes_and_items_of_a_model_output_are_one(recipe):
    model = Gives(Output)
    on(model, recipe)
    out = model(torch.randn(5, 6))
    assert out.logits is out["logits"]
    assert out.logits.dtype == torch.float32


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, *more, batch=None, flag=False):
        y = self.a(x) + sum(self.b(m) for m in more)
        if batch is not None:
            y = y + self.c(batch["deep"][0])
        return y * 2 if flag else y


def test_keyword_and_nested_inputs_that_require_grad(recipe):
    def inputs():
        make = lambda: torch.randn(3, 4, requires_grad=True)  # noqa: E731
        return make(), make(), {"deep": [make(), "x"]}

    def call(model, x, y, batch):
        return model(x, y, batch=batch, flag=True)

    low, exact = check(Takes, inputs, recipe, k=6, call=call)
    assert {"input 0", "input 1", "input 2"} <= low.grads.keys() == exact.grads.keys()


def test_an_input_used_twice_gets_both_gradients(recipe):
    def inputs():
        x = torch.randn(3, 4, requires_grad=True)
        return x, x

    check(Takes, inputs, recipe, k=6)


def test_inputs_are_left_as_they_are(recipe):
    model = Takes()
    on(model, recipe)
    x = torch.randn(3, 4)
    before = x.clone()
    batch = {"deep": [torch.randn(3, 4)]}
    held = batch["deep"][0]
    model(x, batch=batch)
    assert torch.equal(x, before)
    assert batch["deep"][0] is held
    assert x.dtype == held.dtype == torch.float32


class Writes(nn.Module):
    """Changes its input in place, as some models do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x):
        x.mul_(2.0)
        return self.body(x)


def test_an_input_changed_in_place_is_the_callers(recipe):
    low, exact = run(Writes, lambda: torch.ones(2, 4), recipe), None
    x, y = torch.ones(2, 4), torch.ones(2, 4)
    low.model(x)
    exact = run(Writes, lambda: torch.ones(2, 4), "fp32")
    exact.model(y)
    assert torch.equal(x, y)


def test_an_input_returned_as_it_is(recipe):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x):
            return x, self.body(x)

    check(Same, lambda: torch.randn(2, 4, requires_grad=True), recipe, k=4)


def test_a_parameter_or_buffer_returned_is_fp32_with_its_true_gradient(recipe):
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.register_buffer("mean", torch.arange(4.0) / 3)

        def forward(self, x):
            return self.body(x), self.body.weight, self.mean

    low, exact = check(Returns, lambda: torch.randn(2, 4), recipe, k=4)
    assert torch.equal(low.outputs[2], exact.outputs[2])


def test_a_zero_dimensional_loss_made_inside_is_an_fp32_output(recipe):
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 4)

        def forward(self, x, target):
            logits = self.body(x)
            return {"loss": nn.functional.cross_entropy(logits, target), "logits": logits}

    check(
        WithLoss,
        lambda: (torch.randn(5, 6), torch.randint(0, 4, (5,))),
        recipe,
        k=8,
        loss=lambda out: out["loss"],
    )
    check(
        WithLoss,
        lambda: (torch.randn(5, 6), torch.randint(0, 4, (5,))),
        recipe,
        k=8,
        loss=lambda out: out["loss"] + objective(out["logits"]),
    )
