"""The recurrent emulation against a plain loop, written from its definition: forward and backward, fp16.

The gates of a step are one dot product over input and state, added in FP32 and rounded once (a GRU's new
gate has two, since its state part is gated); the cell computes in FP32; state and cell are rounded once a
step. In the backward the gradient of the gates and of the state are rounded once a step, and each weight
gradient is one dot product over all steps.

Both compute in FP32 between the roundings, the twin in FP64: a sum may fall on the other side of a
rounding boundary. So most values are the same bits, and none is further off than what one rounding that
went the other way makes of itself in the steps that follow.
"""

import pytest
import torch
from torch import Tensor, nn

from twins import on

UNIT = 2.0**-11
STEPS, BATCH, WIDTH, INPUT = 6, 3, 8, 5


def rounded(x: Tensor) -> Tensor:
    """To fp16 and back, in FP64."""
    return x.half().double()


class Twin:
    """One layer, one direction: parameters and inputs as the layer sees them, on the fp16 grid."""

    def __init__(self, layer: nn.RNNBase) -> None:
        self.w_ih = rounded(layer.weight_ih_l0.detach())
        self.w_hh = rounded(layer.weight_hh_l0.detach())
        self.b_ih = rounded(layer.bias_ih_l0.detach())
        self.b_hh = rounded(layer.bias_hh_l0.detach())


def lstm(twin, x, h, c, grad_out, grad_h, grad_c):
    width, saved, outs = h.size(1), [], []
    for step in x:
        z = rounded(step @ twin.w_ih.t() + h @ twin.w_hh.t() + twin.b_ih + twin.b_hh)
        i, f, o = (torch.sigmoid(z[:, k * width : (k + 1) * width]) for k in (0, 1, 3))
        new = torch.tanh(z[:, 2 * width : 3 * width])
        cell = rounded(f * c + i * new)
        out = rounded(o * torch.tanh(cell))
        saved.append((i, f, new, o, c, cell, h))
        h, c = out, cell
        outs.append(out)
    last_h, last_c = h, c
    dh, dc, gates = grad_h, grad_c, []
    for (i, f, new, o, before, cell, _), grad in zip(
        reversed(saved), grad_out.flip(0), strict=True
    ):
        d_out = dh + grad
        tanh = torch.tanh(cell)
        d_cell = dc + d_out * o * (1 - tanh**2)
        d = rounded(
            torch.cat(
                [
                    d_cell * new * i * (1 - i),
                    d_cell * before * f * (1 - f),
                    d_cell * i * (1 - new**2),
                    d_out * tanh * o * (1 - o),
                ],
                1,
            )
        )
        dc = rounded(d_cell * f)
        dh = rounded(d @ twin.w_hh)
        gates.append(d)
    d = torch.stack(gates[::-1])
    states = torch.stack([s[-1] for s in saved])
    return torch.stack(outs), (last_h, last_c), d, d, states, (dh, dc)


def gru(twin, x, h, grad_out, grad_h):
    width, saved, outs = h.size(1), [], []
    w_rz, w_new = twin.w_hh[: 2 * width], twin.w_hh[2 * width :]
    for step in x:
        own = step @ twin.w_ih.t() + twin.b_ih
        z_rz = rounded(own[:, : 2 * width] + h @ w_rz.t() + twin.b_hh[: 2 * width])
        gated = rounded(h @ w_new.t() + twin.b_hh[2 * width :])
        r, z = torch.sigmoid(z_rz[:, :width]), torch.sigmoid(z_rz[:, width:])
        new = torch.tanh(rounded(own[:, 2 * width :]) + r * gated)
        out = rounded(new + z * (h - new))
        saved.append((r, z, new, gated, h))
        h = out
        outs.append(out)
    last = h
    dh, inputs, states = grad_h, [], []
    for (r, z, new, gated, before), grad in zip(reversed(saved), grad_out.flip(0), strict=True):
        d_out = dh + grad
        d_new = d_out * (1 - z) * (1 - new**2)
        d_r = rounded(d_new * gated * r * (1 - r))
        d_z = rounded(d_out * (before - new) * z * (1 - z))
        d_gated = rounded(d_new * r)
        d_input_new = rounded(d_new)
        inputs.append(torch.cat([d_r, d_z, d_input_new], 1))
        states.append(torch.cat([d_r, d_z, d_gated], 1))
        dh = rounded(d_out * z + states[-1] @ twin.w_hh)
    d_input, d_state = torch.stack(inputs[::-1]), torch.stack(states[::-1])
    return torch.stack(outs), (last,), d_input, d_state, torch.stack([s[-1] for s in saved]), (dh,)


def plain(twin, x, h, grad_out, grad_h, relu):
    saved, outs = [], []
    for step in x:
        z = rounded(step @ twin.w_ih.t() + h @ twin.w_hh.t() + twin.b_ih + twin.b_hh)
        out = rounded(torch.relu(z) if relu else torch.tanh(z))
        saved.append((out, h))
        h = out
        outs.append(out)
    last, dh, gates = h, grad_h, []
    for (out, _), grad in zip(reversed(saved), grad_out.flip(0), strict=True):
        slope = (out > 0).double() if relu else 1 - out**2
        gates.append(rounded((dh + grad) * slope))
        dh = rounded(gates[-1] @ twin.w_hh)
    d = torch.stack(gates[::-1])
    return torch.stack(outs), (last,), d, d, torch.stack([h for _, h in saved]), (dh,)


def near(low: Tensor, twin: Tensor, what: str, same: float) -> None:
    """Same bits but for a few; those off by what a step's rounding can make of itself in the later ones."""
    low = low.double()
    assert low.shape == twin.shape, what
    equal = (low == twin).double().mean().item()
    assert equal >= same, f"{what}: {equal:.0%} the same bits"
    size = twin.abs().max().item()
    assert (low - twin).abs().max().item() <= 2 * STEPS * UNIT * size, what


class Leaves(nn.Module):
    """Hands its layer's own 16-bit results on, so that nothing but the layer is looked at."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*inputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "relu"])
def test_the_layer_is_the_loop_of_its_definition(kind, seed):
    torch.manual_seed(seed)
    layer = {
        "lstm": lambda: nn.LSTM(INPUT, WIDTH),
        "gru": lambda: nn.GRU(INPUT, WIDTH),
        "tanh": lambda: nn.RNN(INPUT, WIDTH),
        "relu": lambda: nn.RNN(INPUT, WIDTH, nonlinearity="relu"),
    }[kind]()
    twin = Twin(layer)
    x = torch.randn(STEPS, BATCH, INPUT).half().float().requires_grad_()
    states = [
        torch.randn(1, BATCH, WIDTH).div(2).half().float().requires_grad_()
        for _ in range(2 if kind == "lstm" else 1)
    ]
    grads = [
        torch.randn(s).half() for s in [(STEPS, BATCH, WIDTH), *[(BATCH, WIDTH)] * len(states)]
    ]
    model = Leaves(layer)
    switch = on(model, "fp16")
    switch.load_state_dict(switch.state_dict() | {"scale": 1.0})
    out, last = model(x, tuple(states) if kind == "lstm" else states[0])
    last = last if kind == "lstm" else (last,)
    wanted = [grads[0].float(), *[g.float().unsqueeze(0) for g in grads[1:]]]
    torch.autograd.backward([out, *last], wanted)

    given = [x.detach().double(), *[s.detach().double()[0] for s in states]]
    backward = [g.double() for g in grads]
    if kind == "lstm":
        found = lstm(twin, *given, *backward)
    elif kind == "gru":
        found = gru(twin, *given, *backward)
    else:
        found = plain(twin, *given, *backward, kind == "relu")
    outs, lasts, d_input, d_state, previous, d_states = found
    near(out.detach(), outs, "output", 0.9)
    for a, b in zip(last, lasts, strict=True):
        near(a.detach()[0], b, "last state", 0.9)
    for s, d in zip(states, d_states, strict=True):
        near(s.grad[0], d, "gradient of the state", 0.8)
    near(x.grad, rounded(d_input @ twin.w_ih), "gradient of the input", 0.8)
    flat = d_input.flatten(0, 1), d_state.flatten(0, 1)
    near(layer.weight_ih_l0.grad, rounded(flat[0].t() @ given[0].flatten(0, 1)), "weight_ih", 0.7)
    near(layer.weight_hh_l0.grad, rounded(flat[1].t() @ previous.flatten(0, 1)), "weight_hh", 0.7)
    near(layer.bias_ih_l0.grad, rounded(flat[0].sum(0)), "bias_ih", 0.7)
    near(layer.bias_hh_l0.grad, rounded(flat[1].sum(0)), "bias_hh", 0.7)
