"""One weight in several places, one module called several times, parts of a model called by themselves."""

import pytest
import torch
from torch import nn

from twins import RECIPES, check, on

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


class Tied(nn.Module):
    """The output layer is the embedding, transposed."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index):
        return self.head(torch.tanh(self.body(self.table(index))))


def test_tied_weights_get_the_sum_of_both_gradients(recipe):
    low, _ = check(Tied, lambda: torch.randint(0, 12, (4, 5)), recipe, k=8)
    assert low.model.head.weight is low.model.table.weight
    assert len(list(low.model.parameters())) == 3


def test_tied_weights_stay_tied_after_steps(recipe):
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = on(model, recipe, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(0, 12, (4, 5))).square().mean().backward()
        optimizer.step()
        assert switch.last_step.applied
    assert model.head.weight is model.table.weight
    switch.off()
    assert model.head.weight is model.table.weight


class SelfAttribute(nn.Module):
    """A parameter of a child under a second name in the parent, and transposed in a matmul."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.also = self.body.weight

    def forward(self, x):
        return self.body(x) @ self.also.t() + self.also.sum()


def test_a_parameter_under_two_names(recipe):
    check(SelfAttribute, lambda: torch.randn(4, 6, requires_grad=True), recipe, k=8)


class Recurring(nn.Module):
    """One block used at every depth."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6))
        self.again = self.block

    def forward(self, x):
        for _ in range(3):
            x = x + self.block(x)
        return self.again(x)


def test_a_shared_module(recipe):
    check(Recurring, lambda: torch.randn(4, 6), recipe, k=24)


def test_several_calls_before_one_backward(recipe):
    def call(model, a, b, c):
        return model(a), model(b) * 2.0, model(model(c))

    make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))  # noqa: E731
    check(
        make,
        lambda: tuple(torch.randn(4, 6, requires_grad=True) for _ in range(3)),
        recipe,
        k=12,
        call=call,
    )


def test_several_backwards_into_one_graph(recipe):
    def losses(out):
        first, second = out[0].square().mean(), out[1].sum() / 7.0
        first.backward(retain_graph=True)
        return second

    def call(model, x):
        h = model(x)
        return h, h.cos()

    check(lambda: nn.Linear(6, 6), lambda: torch.randn(4, 6), recipe, k=6, call=call, loss=losses)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.GELU())
        self.decoder = nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.decoder(self.encode(x))

    def encode(self, x):
        return self.encoder(x) * self.scale

    def embed_and_read(self, x):
        """No forward: outside of any region but within its parts."""
        return self.decoder(self.encode(x) + 1.0)


CALLS = {
    "submodules": lambda m, x: m.decoder(m.encoder(x)),
    "a deep submodule": lambda m, x: m.encoder[0](x),
    "a method that is no forward": lambda m, x: m.embed_and_read(x),
    "a method that reads a parameter itself": lambda m, x: m.encode(x),
    "a part and the whole": lambda m, x: m.decoder(m.encoder(x)) + m(x),
    "the whole on a part's output": lambda m, x: m(m.decoder(m.encoder(x))),
    "a mix with the weights themselves": lambda m, x: m(x) + m.decoder.weight.square().sum(),
    "functional use of a weight": lambda m, x: nn.functional.linear(m.encoder(x), m.decoder.weight),
}


@pytest.mark.parametrize("name", CALLS)
def test_parts_called_by_themselves(recipe, name):
    low, _ = check(
        Parts, lambda: torch.randn(4, 6, requires_grad=True), recipe, k=16, call=CALLS[name]
    )
    for p in low.model.parameters():
        assert p.dtype == torch.float32


def test_between_parts_all_is_fp32(recipe):
    model = Parts()
    on(model, recipe)
    h = model.encoder(torch.randn(4, 6))
    assert h.dtype == torch.float32
    assert (h * model.scale).dtype == torch.float32
    assert model.scale.dtype == torch.float32


def test_call_of_forward_itself(recipe):
    """``model.forward(x)`` is no call of a module: the parent's code is outside, its children are not."""
    check(Parts, lambda: torch.randn(4, 6), recipe, k=12, call=lambda m, x: m.forward(x))


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6) / 3) for _ in range(3)])
        self.named = nn.ParameterDict(
            {"gain": nn.Parameter(torch.ones(6)), "shift": torch.zeros(6)}
        )
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.by_name = nn.ModuleDict({"head": nn.Linear(6, 2)})

    def forward(self, x):
        for weight, layer in zip(self.weights, self.layers, strict=False):
            x = torch.tanh(layer(x @ weight))
        x = x @ self.weights[-1]
        x = x * self.named["gain"] + self.named["shift"]
        return self.by_name["head"](x), [w.dtype for w in self.weights]


def test_parameter_lists_and_dicts(recipe):
    low, _ = check(Lists, lambda: torch.randn(4, 6), recipe, k=16)
    dtype = torch.bfloat16 if recipe == "bf16" else torch.float16
    assert low.model(torch.randn(4, 6))[1] == [dtype] * 3


class Momentum(nn.Module):
    """A second encoder that follows the first, updated inside forward between the uses of the two."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)
        self.key.requires_grad_(False)

    def forward(self, x):
        q = self.query(x)
        with torch.no_grad():
            for a, b in zip(self.query.parameters(), self.key.parameters(), strict=True):
                b.data = b.data * 0.5 + a.data * 0.5
            k = self.key(x)
        return q * k


def test_masters_updated_inside_forward_by_way_of_parameters(recipe):
    """parameters() gives the masters there too: the update is FP32's to the bit, and read at once."""

    def call(model, x):
        model(x)
        return model(x)

    low, exact = check(Momentum, lambda: torch.randn(4, 6), recipe, k=5, call=call)
    assert torch.equal(low.model.key.weight, exact.model.key.weight)


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.register_buffer("position", torch.linspace(0, 1, 6))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(6), persistent=False)

    def forward(self, x):
        self.count += 1
        h = self.body(x) + self.position
        with torch.no_grad():
            self.average.lerp_(h.float().mean(0), 0.1)
        return h


def test_buffers_are_fp32_and_updated(recipe):
    low, exact = check(Buffers, lambda: torch.randn(4, 6), recipe, k=4)
    assert low.model.count == exact.model.count == 1
    assert low.model.average.dtype == low.model.position.dtype == torch.float32
    torch.testing.assert_close(low.model.average, exact.model.average, rtol=0.05, atol=1e-3)
    assert torch.equal(low.model.position, exact.model.position)
