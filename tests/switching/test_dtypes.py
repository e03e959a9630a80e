"""Integers, FP64 and complex numbers go their own way; activations and outputs are changed in place."""

import pytest
import torch
from torch import nn

from twins import RECIPES, check, run

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


class Indexed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, index, mask):
        h = self.table(index)
        return self.head(torch.where(mask.unsqueeze(-1), h, torch.zeros_like(h))), index, mask


def test_integer_and_boolean_inputs_and_outputs(recipe):
    def inputs():
        return torch.randint(0, 10, (4, 5)), torch.rand(4, 5) > 0.3

    low, _ = check(Indexed, inputs, recipe, k=6)
    index, mask = inputs()
    _, same_index, same_mask = low.model(index, mask)
    assert same_index is index
    assert same_mask is mask


class Double(nn.Module):
    """FP64 goes its own way beside the layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x, exact):
        return self.body(x), exact.cumsum(0) / 3.0, self.body(x).double() * exact


def test_fp64_stays_fp64(recipe):
    def inputs():
        return torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    low, exact = check(Double, inputs, recipe, k=6)
    assert [t.dtype for t in low.outputs] == [torch.float32, torch.float64, torch.float64]
    assert torch.equal(low.outputs[1], exact.outputs[1])
    assert low.grads["input 1"].dtype == torch.float64


def test_the_gradient_of_what_is_computed_in_fp64_is_fp64s(recipe):
    """Nothing on the way from the FP64 output to the FP64 input is rounded, so its gradient is not."""

    def inputs():
        return torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def loss(out):
        return (out[1] * torch.linspace(0.1, 1.0, 12, dtype=torch.float64).view(3, 4)).sum()

    low = run(Double, inputs, recipe, loss=loss)
    exact = run(Double, inputs, "fp32", loss=loss)
    torch.testing.assert_close(low.grads["input 1"], exact.grads["input 1"], rtol=1e-15, atol=0)


class Complex(nn.Module):
    """A complex parameter and complex tensors among real layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x, z):
        real = self.body(x).float()
        turned = torch.complex(real, real * 0.5) * self.turn + z
        return turned, turned.abs()


def test_complex_tensors_are_left_alone_and_get_their_gradients(recipe):
    def inputs():
        return torch.randn(3, 4), torch.randn(3, 4, dtype=torch.complex64, requires_grad=True)

    low, _ = check(Complex, inputs, recipe, k=6)
    assert [t.dtype for t in low.outputs] == [torch.complex64, torch.float32]
    assert low.grads["turn"].dtype == torch.complex64


class Spectrum(nn.Module):
    """A Fourier layer with complex weights, as neural operators have."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(1, 4)
        self.weight = nn.Parameter(torch.randn(4, 4, 5, dtype=torch.complex64) / 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        h = self.lift(x.unsqueeze(-1)).transpose(1, 2)
        f = torch.fft.rfft(h.float())
        f = torch.einsum("bci,coi->boi", f[..., :5], self.weight)
        h = h + torch.fft.irfft(f, n=h.size(-1))
        return self.head(h.transpose(1, 2))


def test_a_fourier_layer_with_complex_weights(recipe):
    check(Spectrum, lambda: torch.randn(2, 16), recipe, k=8)


@pytest.mark.parametrize("change", ["add", "mul", "relu", "index", "masked"])
def test_outputs_may_be_changed_in_place(recipe, change):
    def call(model, x):
        out = model(x)
        if change == "add":
            out += 1
        elif change == "mul":
            out.mul_(2.0)
        elif change == "relu":
            out.relu_()
        elif change == "index":
            out[:, 0] = 0.0
        else:
            out.masked_fill_(torch.ones_like(out, dtype=torch.bool).triu(), 0.5)
        return out

    check(lambda: nn.Linear(6, 4), lambda: torch.randn(5, 6), recipe, k=4, call=call)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 6, 3), nn.Conv1d(6, 6, 1)

    def forward(self, x):
        h = self.a(x)
        h += 0.5
        h[:, 0] *= 2.0
        h.clamp_(max=3.0).sub_(0.25)
        y = self.b(h)
        y.mul_(0.5).add_(h)
        return nn.functional.leaky_relu_(y)


def test_activations_may_be_changed_in_place(recipe):
    check(InPlace, lambda: torch.randn(2, 3, 8, requires_grad=True), recipe, k=8)
