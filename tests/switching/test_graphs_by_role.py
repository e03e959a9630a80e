"""Recipes that round operands by role, compiled: a traced tensor is the weight that it stands for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from compiled_models import MODELS, Counted, check_bits, same, train
from halfstep.switching import region

pytestmark = pytest.mark.filterwarnings("default")  # torch's own, in its compiler


class Weights(nn.Module):
    """Weights where no layer says that they are: views of one, a shared one, in einsum, read again."""

    def __init__(self):
        super().__init__()
        self.look = nn.Embedding(10, 32)
        self.qkv = nn.Parameter(torch.randn(32, 96) / 6)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def part(self, h):
        return h + self.b(F.silu(self.a(h)))

    def forward(self, x):
        h = self.look(x)
        q, k, v = self.qkv.chunk(3, 1)
        h = h + torch.softmax((h @ q) @ (h @ k).mT / 6, -1) @ (h @ v)
        h = checkpoint(self.part, h, use_reentrant=False)
        h = torch.einsum("btc,cd->btd", h, self.qkv[:, :32])
        return h @ self.look.weight.t()


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


MODELS["weights"] = (Weights, lambda n: torch.randint(10, (n, 6)))

# Weights in a format of their own; FP32 storage; random bits and Hadamard's transform; kept layers.
QUICK = ["int8", "binary:keep=none", "nvfp4:keep=none", "fp8-chunk64"]
RECIPES = [
    "fp8", "fp8-rowwise", "fp8-block", "fp8-chunk64", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "nvfp4:keep=none",
    "int8", "binary", "binary:keep=none", "tf32", "bf16:weight=e4m3fn", "fp16:activation=e5m2@tensor",
]  # fmt: skip


@pytest.mark.parametrize("recipe", QUICK)
def test_the_bits_are_those_of_the_eager_region_and_the_inside_is_one_graph(recipe):
    check_bits("weights", recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["transformer", "cnn", "attention", "several", "weights"])
def test_the_bits_of_every_model_in_every_recipe(name, recipe):
    check_bits(name, recipe)


def test_a_graph_is_told_of_its_weights_only():
    """Were it not, a recipe that rounds only weights would do nothing."""
    only = "fp32:store=bf16,weight=binary"
    wanted = train("weights", only, lambda m: torch.compile(m, backend="aot_eager"))
    assert same(wanted, train("weights", only))
    assert not same(wanted, train("weights", "bf16"))


def test_batches_of_many_sizes_make_two_graphs():
    counted = Counted()
    sizes = (8, 5, 3, 12, 7)
    found = train("weights", "mxfp8", lambda m: torch.compile(m, backend=counted), sizes)
    assert same(found, train("weights", "mxfp8", None, sizes))
    assert len(counted.graphs) == 3  # the first size, any size, and evaluation


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "mxfp8"])
def test_inductor_gives_the_losses_of_the_eager_region(recipe):
    losses, *_ = train("attention", recipe, torch.compile)
    assert same([losses], [train("attention", recipe)[0]])


class Halves(nn.Module):
    """A part that no compiler looks into, between two that are compiled."""

    def __init__(self, look, hands_on=False):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 10)
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.look, self.hands_on = look, hands_on

    def forward(self, x):
        h = self.first(x).relu()
        w = self.weight
        self.look(self, h)
        return self.second(h @ (w if self.hands_on else self.weight))


def test_a_region_forgets_the_tensors_of_a_tracing():
    """Their places in memory are given to others: an activation there would be a weight."""
    seen = []

    @torch.compiler.disable
    def look(model, h):
        here = region.current()
        copies = [
            model.first.weight,
            model.first.bias,
            model.second.weight,
            model.second.bias,
            model.weight,
        ]
        known = {t.untyped_storage()._cdata for t in copies}
        seen.append(known == set(here.weights))

    MODELS["halves"] = (lambda: Halves(look), lambda n: torch.randn(n, 16))
    found = train("halves", "int8", lambda m: torch.compile(m, backend="aot_eager"))
    assert seen == [True] * 4
    assert same(found, train("halves", "int8"))


def test_a_weight_that_is_handed_to_a_part_compiled_by_itself_leaves_the_region_eager():
    look = torch.compiler.disable(lambda model, h: None)
    MODELS["handed"] = (lambda: Halves(look, hands_on=True), lambda n: torch.randn(n, 16))
    with pytest.warns(RuntimeWarning, match="leaves Halves to run eagerly: .* recipe int8"):
        found = train("handed", "int8", lambda m: torch.compile(m, backend="aot_eager"))
    assert same(found, train("handed", "int8"))


def test_histories_of_scales_leave_the_region_eager():
    with pytest.warns(RuntimeWarning, match="run eagerly: recipe fp8-delayed keeps a history"):
        found = train("mlp", "fp8-delayed", lambda m: torch.compile(m, backend="aot_eager"))
    assert same(found, train("mlp", "fp8-delayed"))
