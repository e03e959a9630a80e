"""LSTM, GRU and plain recurrent layers in all their forms, cells, and the list of weights they keep."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from twins import RECIPES, check, on

pytestmark = [
    pytest.mark.parametrize("recipe", RECIPES),
    # torch says so in FP32 too
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": lambda *a, **k: nn.RNN(*a, nonlinearity="tanh", **k),
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}
FORMS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "two layers with dropout": {"num_layers": 2, "dropout": 0.0},
    "both directions": {"bidirectional": True},
    "both directions, two layers, batch first": {
        "bidirectional": True,
        "num_layers": 2,
        "batch_first": True,
    },
    "no bias": {"bias": False},
    "no bias, both directions": {"bias": False, "bidirectional": True},
}
# Errors of a recurrence are fed back: one rounding a step, six steps, two directions or layers.
K = 16


def flat_weights_are_masters(rnn):
    assert len(rnn._flat_weights) == len(rnn._flat_weights_names)
    for name, weight in zip(rnn._flat_weights_names, rnn._flat_weights, strict=True):
        assert weight is getattr(rnn, name)
        assert type(weight) is nn.Parameter
        assert weight.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_padded(recipe, kind, form):
    low, _ = check(
        lambda: KINDS[kind](5, 6, **FORMS[form]),
        lambda: torch.randn(6, 3, 5, requires_grad=True),
        recipe,
        k=K,
    )
    flat_weights_are_masters(low.model)
    assert all(t.dtype == torch.float32 for t in low.outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_with_a_given_state(recipe, kind):
    def inputs():
        x = torch.randn(6, 5, requires_grad=True)
        h = torch.randn(2, 6, requires_grad=True)
        return x, (h, torch.randn(2, 6, requires_grad=True)) if kind == "lstm" else h

    low, _ = check(lambda: KINDS[kind](5, 6, bidirectional=True), inputs, recipe, k=K)
    assert len(low.outputs) == (3 if kind == "lstm" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_state_is_carried_on(recipe, kind):
    """Truncated backpropagation: the state of one chunk, detached, begins the next."""

    def call(model, x):
        first, state = model(x)
        state = tuple(s.detach() for s in state) if kind == "lstm" else state.detach()
        return first, model(x, state)

    check(lambda: KINDS[kind](5, 6), lambda: torch.randn(6, 3, 5), recipe, k=2 * K, call=call)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_with_its_graph_is_carried_on(recipe, kind):
    def call(model, x):
        first, state = model(x)
        return first, model(x, state)

    check(lambda: KINDS[kind](5, 6), lambda: torch.randn(4, 3, 5), recipe, k=2 * K, call=call)


class Packed(nn.Module):
    """Sequences of several lengths, packed inside or given packed; the result packed or padded."""

    def __init__(self, kind, given, gives, **form):
        super().__init__()
        self.lift = nn.Linear(5, 5)
        self.rnn = KINDS[kind](5, 6, **form)
        self.given, self.gives = given, gives

    def forward(self, x, lengths=None):
        if not self.given:
            x = pack_padded_sequence(self.lift(x), lengths, enforce_sorted=False)
        out, state = self.rnn(x)
        return (out if self.gives else pad_packed_sequence(out)[0]), state


@pytest.mark.parametrize(
    "form", ["plain", "both directions", "two layers", "no bias, both directions"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_inside(recipe, kind, form):
    def inputs():
        return torch.randn(6, 4, 5, requires_grad=True), torch.tensor([2, 6, 1, 4])

    check(lambda: Packed(kind, False, False, **FORMS[form]), inputs, recipe, k=K)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_packed_outside(recipe, kind):
    def inputs():
        return (pack_sequence([torch.randn(n, 5) for n in (2, 6, 1)], enforce_sorted=False),)

    low, _ = check(lambda: Packed(kind, True, True), inputs, recipe, k=K)
    out, _ = low.model(*inputs())
    assert type(out) is PackedSequence
    assert out.data.dtype == torch.float32
    assert out.sorted_indices is not None


@pytest.mark.parametrize("form", ["plain", "both directions", "two layers", "no bias"])
def test_projected_lstm(recipe, form):
    check(
        lambda: nn.LSTM(5, 6, proj_size=3, **FORMS[form]),
        lambda: torch.randn(5, 3, 5, requires_grad=True),
        recipe,
        k=K,
    )


def test_projected_lstm_packed(recipe):
    def inputs():
        return torch.randn(6, 3, 5, requires_grad=True), torch.tensor([2, 6, 1])

    check(lambda: Packed("lstm", False, False, proj_size=3), inputs, recipe, k=K)


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        make = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}.get(kind)
        self.cell = make(5, 6) if make else nn.RNNCell(5, 6, nonlinearity=kind)

    def forward(self, x):
        state, outs = None, []
        for step in x:
            state = self.cell(step, state) if state is not None else self.cell(step)
            outs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outs), state


@pytest.mark.parametrize("kind", KINDS)
def test_cells(recipe, kind):
    check(lambda: Cells(kind), lambda: torch.randn(5, 3, 5, requires_grad=True), recipe, k=K)


def test_a_frozen_input_weight(recipe):
    def make():
        rnn = nn.LSTM(5, 6)
        rnn.weight_ih_l0.requires_grad_(False)
        rnn.bias_hh_l0.requires_grad_(False)
        return rnn

    low, _ = check(make, lambda: torch.randn(5, 3, 5), recipe, k=K)
    assert low.grads.keys() == {"weight_hh_l0", "bias_ih_l0"}


@pytest.mark.parametrize("mode", ["no_grad", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_inference(recipe, kind, mode):
    def call(model, x):
        model.eval()
        if mode == "eval":
            return model(x)
        with torch.no_grad():
            return model(x)

    low, _ = check(
        lambda: KINDS[kind](5, 6, num_layers=2, dropout=0.5),
        lambda: torch.randn(6, 3, 5),
        recipe,
        k=K,
        call=call,
        backward=False,
    )
    flat_weights_are_masters(low.model)


def test_dropout_between_layers(recipe):
    torch.manual_seed(0)
    model = nn.LSTM(5, 64, num_layers=2, dropout=0.5)
    on(model, recipe)
    x = torch.randn(6, 3, 5)
    first, second = model(x)[0], model(x)[0]
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_a_layer_with_new_weights_while_on(recipe):
    """Assigned weights are read in the next forward, and its list follows."""

    def call(model, x):
        model(x)
        torch.manual_seed(3)
        model.weight_hh_l0 = nn.Parameter(torch.randn(24, 6) / 3)
        return model(x)

    low, _ = check(lambda: nn.LSTM(5, 6), lambda: torch.randn(4, 3, 5), recipe, k=K, call=call)
    flat_weights_are_masters(low.model)


def test_weight_dropped_and_shared_layers(recipe):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.GRU(6, 6), nn.GRU(6, 6)
            self.b.weight_hh_l0 = self.a.weight_hh_l0

        def forward(self, x):
            return self.b(self.a(self.a(x)[0])[0])

    check(Shared, lambda: torch.randn(4, 3, 6), recipe, k=3 * K)


def test_empty_state_and_single_step(recipe):
    check(lambda: nn.GRU(5, 6), lambda: torch.randn(1, 1, 5, requires_grad=True), recipe, k=K)
    check(lambda: nn.LSTM(5, 6), lambda: torch.randn(1, 1, 5, requires_grad=True), recipe, k=K)
