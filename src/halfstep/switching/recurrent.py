"""LSTM, GRU and plain recurrent layers step by step over time, where torch would hide the steps.

The layer is defined so: the gates of a step are one dot product over input and state, added in the
accumulator and rounded once to the low dtype (a GRU's new gate has two, since its state part is gated);
the cell computes in FP32; state and cell are rounded once a step. In the backward the gradient of the gates
and of the state are rounded once a step, and each weight gradient is one dot product over all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from halfstep.switching.operands import Product

if TYPE_CHECKING:
    from halfstep.switching.emulated import Emulator

__all__ = ["recurrent_layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """The time axis of a packed batch: step t is rows ``starts[t] : starts[t] + sizes[t]``."""

    sizes: tuple[int, ...]
    reverse: bool

    def order(self) -> list[tuple[int, int]]:
        """(first row, rows) of each step, in the order of computation."""
        spans, start = [], 0
        for size in self.sizes:
            spans.append((start, size))
            start += size
        return spans[::-1] if self.reverse else spans

    def previous(self, batch: int, device: torch.device) -> Tensor:
        """For each row, where its previous state stands in ``cat([initial state, output])``."""
        rows: list[Tensor] = []
        last = torch.arange(batch)  # row of the state that each sequence now has
        for start, size in self.order():
            rows.append(last[:size].clone())
            last[:size] = batch + start + torch.arange(size)
        return torch.cat(rows[::-1] if self.reverse else rows).to(device)


def _round(emulator: Emulator, t: Tensor) -> Tensor:
    return t.to(emulator.low).to(torch.float32)


def _lstm_forward(
    emulator: Emulator,
    steps: _Steps,
    gates: Tensor,
    w_hh: Tensor,
    h: Tensor,
    c: Tensor,
    low: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    width = h.size(1)
    cells = gates.new_empty(gates.size(0), width)
    outs = torch.empty(gates.size(0), width, dtype=low, device=gates.device)
    state_rows = emulator.repeated(w_hh, len(h))
    for start, n in steps.order():
        g = gates[start : start + n]
        g.add_(state_rows(h[:n]))
        g.copy_(g.to(low))
        g[:, : 2 * width].sigmoid_()
        g[:, 2 * width : 3 * width].tanh_()
        g[:, 3 * width :].sigmoid_()
        i, f, new, o = g.chunk(4, 1)
        cell = cells[start : start + n].copy_(torch.mul(f, c[:n]).addcmul_(i, new).to(low))
        if n == len(c):
            c = cell  # all sequences go on: the cell of this step is the state of the next
        else:
            c = torch.cat([cell, c[n:]])
        out = outs[start : start + n]
        out.copy_(torch.tanh(cell).mul_(o))
        h[:n] = out
    return outs, cells, c


def _lstm_backward(
    emulator: Emulator,
    steps: _Steps,
    gates: Tensor,
    cells: Tensor,
    previous_cells: Tensor,
    w_hh: Tensor,
    grad_out: Tensor,
    dh: Tensor,
    dc: Tensor,
) -> Tensor:
    width = dh.size(1)
    i, f, new, o = gates.chunk(4, 1)
    tanh_c = torch.tanh(cells)
    through_cell = (1 - tanh_c * tanh_c) * o
    through_out = tanh_c * o * (1 - o)
    through_gates = torch.stack(
        [new * i * (1 - i), previous_cells * f * (1 - f), i * (1 - new * new)], 1
    )
    d_gates = torch.empty_like(gates)
    state_rows = emulator.repeated(w_hh.t(), len(dh), Product.GRAD_INPUT)
    for start, n in reversed(steps.order()):
        rows = slice(start, start + n)
        d_out = dh[:n].add_(grad_out[rows])
        d_cell = dc[:n].addcmul_(d_out, through_cell[rows])
        d = d_gates[rows]
        torch.mul(d_cell.unsqueeze(1), through_gates[rows], out=d.view(n, 4, width)[:, :3])
        torch.mul(d_out, through_out[rows], out=d[:, 3 * width :])
        d.copy_(d.to(emulator.low))
        dc[:n] = (d_cell * f[rows]).to(emulator.low)
        dh[:n] = state_rows(d).to(emulator.low)
    return d_gates


def _gru_forward(
    emulator: Emulator,
    steps: _Steps,
    gates: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h: Tensor,
    low: torch.dtype,
) -> tuple[Tensor, Tensor]:
    width = h.size(1)
    gates[:, 2 * width :] = gates[:, 2 * width :].to(low)
    gated = gates.new_empty(gates.size(0), width)  # the state's part of the new gate
    outs = torch.empty(gates.size(0), width, dtype=low, device=gates.device)
    state_rows = emulator.repeated(w_hh, len(h))
    for start, n in steps.order():
        g = gates[start : start + n]
        state = state_rows(h[:n])
        if b_hh is not None:
            state += b_hh
        rz, new = g[:, : 2 * width], g[:, 2 * width :]
        rz.add_(state[:, : 2 * width])
        rz.copy_(rz.to(low)).sigmoid_()
        part = gated[start : start + n].copy_(state[:, 2 * width :].to(low))
        new.addcmul_(rz[:, :width], part).tanh_()
        out = outs[start : start + n]
        out.copy_(torch.lerp(new, h[:n], rz[:, width:]))
        h[:n] = out
    return outs, gated


def _gru_backward(
    emulator: Emulator,
    steps: _Steps,
    gates: Tensor,
    gated: Tensor,
    previous: Tensor,
    w_hh: Tensor,
    grad_out: Tensor,
    dh: Tensor,
) -> tuple[Tensor, Tensor]:
    width = dh.size(1)
    r, z, new = gates.chunk(3, 1)
    through_new = (1 - z) * (1 - new * new)
    factors = torch.stack(
        [
            through_new * gated * r * (1 - r),
            (previous - new) * z * (1 - z),
            through_new * r,
            through_new,
        ],
        1,
    )
    d_all = gates.new_empty(gates.size(0), 4, width)
    state_rows = emulator.repeated(w_hh.t(), len(dh), Product.GRAD_INPUT)
    for start, n in reversed(steps.order()):
        rows = slice(start, start + n)
        d_out = dh[:n].add_(grad_out[rows])
        d = torch.mul(d_out.unsqueeze(1), factors[rows], out=d_all[rows])
        d.copy_(d.to(emulator.low))
        d_state = d[:, :3].reshape(n, 3 * width)
        d_out.mul_(z[rows]).add_(state_rows(d_state))
        dh[:n] = d_out.to(emulator.low)
    flat = d_all.view(-1, 4 * width)
    d_state = flat[:, : 3 * width]
    d_input = torch.cat([flat[:, : 2 * width], flat[:, 3 * width :]], 1)
    return d_input, d_state


def _plain_forward(
    emulator: Emulator,
    steps: _Steps,
    gates: Tensor,
    w_hh: Tensor,
    h: Tensor,
    low: torch.dtype,
    relu: bool,
) -> Tensor:
    outs = torch.empty(gates.size(0), h.size(1), dtype=low, device=gates.device)
    state_rows = emulator.repeated(w_hh, len(h))
    for start, n in steps.order():
        z = _round(emulator, gates[start : start + n] + state_rows(h[:n]))
        out = outs[start : start + n]
        out.copy_(torch.relu(z) if relu else torch.tanh(z))
        h[:n] = out
    return outs


def _plain_backward(
    emulator: Emulator,
    steps: _Steps,
    outs: Tensor,
    w_hh: Tensor,
    grad_out: Tensor,
    dh: Tensor,
    relu: bool,
) -> Tensor:
    factors = (outs > 0).to(torch.float32) if relu else 1 - outs * outs
    d_gates = torch.empty_like(outs)
    state_rows = emulator.repeated(w_hh.t(), len(dh), Product.GRAD_INPUT)
    for start, n in reversed(steps.order()):
        rows = slice(start, start + n)
        d = d_gates[rows].copy_(((dh[:n] + grad_out[rows]) * factors[rows]).to(emulator.low))
        dh[:n] = state_rows(d).to(emulator.low)
    return d_gates


class _Layer(Function):
    """One layer, one direction, packed rows: x (rows, in) -> out (rows, hidden), last state, last cell."""

    @staticmethod
    def forward(
        ctx: Any,
        emulator: Emulator,
        kind: str,
        steps: _Steps,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
    ) -> Any:
        low = emulator.low
        xf, w_in, w_state = x.float(), w_ih.float(), w_hh.float()
        gates = emulator.rows(xf, w_in)
        if b_ih is not None and b_hh is not None:
            bias = b_ih.float().clone()
            bias += (
                F.pad(b_hh[: 2 * h0.size(1)].float(), (0, h0.size(1)))
                if kind == "gru"
                else b_hh.float()
            )
            gates += bias
        h = h0.float().clone()
        c = None if c0 is None else c0.float().clone()
        cells = gated = None
        if kind == "lstm":
            outs, cells, c = _lstm_forward(emulator, steps, gates, w_state, h, c, low)  # pyright: ignore[reportArgumentType]
        elif kind == "gru":
            b_new = None
            if b_hh is not None:
                b_new = b_hh.float().clone()
                b_new[: 2 * h0.size(1)] = 0.0
            outs, gated = _gru_forward(emulator, steps, gates, w_state, b_new, h, low)
        else:
            outs = _plain_forward(emulator, steps, gates, w_state, h, low, kind == "rnn_relu")
        ctx.emulator, ctx.kind, ctx.steps = emulator, kind, steps
        ctx.save_for_backward(x, h0, c0, w_ih, w_hh, outs, gates, cells, gated)
        ctx.has_bias = b_ih is not None
        last = h.to(low)
        return outs, last, (last.new_empty(0) if c is None else c.to(low))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_h: Tensor, grad_c: Tensor) -> Any:
        x, h0, c0, w_ih, w_hh, outs, gates, cells, gated = ctx.saved_tensors
        emulator, kind, steps = ctx.emulator, ctx.kind, ctx.steps
        low = emulator.low
        w_state, d_out = w_hh.float(), grad_out.float()
        index = steps.previous(h0.size(0), h0.device)
        previous = torch.cat([h0, outs]).index_select(0, index).float()
        dh = grad_h.float().clone()
        dc = None
        if kind == "lstm":
            before = torch.cat([c0.float(), cells]).index_select(0, index)
            dc = grad_c.float().clone()
            d_input = d_state = _lstm_backward(
                emulator, steps, gates, cells, before, w_state, d_out, dh, dc
            )
        elif kind == "gru":
            d_input, d_state = _gru_backward(
                emulator, steps, gates, gated, previous, w_state, d_out, dh
            )
        else:
            d_input = d_state = _plain_backward(
                emulator, steps, outs.float(), w_state, d_out, dh, kind == "rnn_relu"
            )
        d_x = None
        if ctx.needs_input_grad[3]:
            d_x = emulator.rows(d_input, w_ih.float().t(), Product.GRAD_INPUT).to(low)
        d_w_ih = emulator.rows(d_input.t(), x.float().t(), Product.GRAD_WEIGHT).to(low)
        d_w_hh = emulator.rows(d_state.t(), previous.t(), Product.GRAD_WEIGHT).to(low)
        d_b_ih = d_input.sum(0).to(low) if ctx.has_bias else None
        d_b_hh = d_state.sum(0).to(low) if ctx.has_bias else None
        return (
            None,
            None,
            None,
            d_x,
            dh.to(low),
            None if dc is None else dc.to(low),
            d_w_ih,
            d_w_hh,
            d_b_ih,
            d_b_hh,
        )


def recurrent_layers(
    emulator: Emulator, op: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> Any:
    """What ``torch.lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` give, padded or packed, in the low dtype.

    Same arguments and results as the aten overload ``op``.
    """
    kind = op._schema.name.removeprefix("aten::")
    values = dict(zip([a.name for a in op._schema.arguments], args, strict=False)) | kwargs
    hx = values["hx"]
    states = list(hx) if kind == "lstm" else [hx]
    h0 = emulator.lowered(states[0])
    c0 = emulator.lowered(states[1]) if kind == "lstm" else None
    params = [emulator.lowered(p) for p in values["params"]]
    packed = op._overloadname == "data"
    if packed:
        x = emulator.lowered(values["data"])
        sizes = tuple(values["batch_sizes"].tolist())
    else:
        x = emulator.lowered(values["input"])
        if values.get("batch_first"):
            x = x.transpose(0, 1)
        sizes = (x.size(1),) * x.size(0)
        x = x.reshape(-1, x.size(-1))
    directions = 2 if values["bidirectional"] else 1
    out, last_h, last_c = _stack(emulator, kind, sizes, x, h0, c0, params, values, directions)
    if not packed:
        out = out.view(len(sizes), -1, out.size(-1))
        if values.get("batch_first"):
            out = out.transpose(0, 1)
    return (out, last_h, last_c) if kind == "lstm" else (out, last_h)


def _stack(
    emulator: Emulator,
    kind: str,
    sizes: tuple[int, ...],
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    values: dict[str, Any],
    directions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    layers = values["num_layers"]
    each = len(params) // (layers * directions)
    biased = bool(values["has_biases"])
    projected = each == (5 if biased else 3)
    hs, cs = [], []
    for layer in range(layers):
        outs = []
        for direction in range(directions):
            k = layer * directions + direction
            own = params[k * each : (k + 1) * each]
            b_ih, b_hh = (own[2], own[3]) if biased else (None, None)
            steps = _Steps(sizes=sizes, reverse=direction == 1)
            cell = None if c0 is None else c0[k]
            if projected:
                out, h, c = _projected(emulator, steps, x, h0[k], cell, own, b_ih, b_hh)
            else:
                out, h, c = _Layer.apply(
                    emulator.of_layer(own[0]),
                    kind,
                    steps,
                    x,
                    h0[k],
                    cell,
                    own[0],
                    own[1],
                    b_ih,
                    b_hh,
                )  # pyright: ignore[reportGeneralTypeIssues]
            outs.append(out)
            hs.append(h)
            cs.append(c)
        x = torch.cat(outs, -1) if directions == 2 else outs[0]
        if values["dropout"] > 0.0 and values["train"] and layer < layers - 1:
            x = F.dropout(x, values["dropout"])
    return x, torch.stack(hs), torch.stack(cs)


def _projected(
    emulator: Emulator,
    steps: _Steps,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    own: Sequence[Tensor],
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """An LSTM with ``proj_size``: the state is the projected output. Composed of single steps."""
    w_ih, w_hh, w_hr = own[0], own[1], own[-1]
    wide = emulator.operand
    rows: dict[int, Tensor] = {}
    gates_x = emulator.matmul(x, w_ih.t())
    if b_ih is not None and b_hh is not None:
        gates_x = gates_x + b_ih.float() + b_hh.float()
    for start, n in steps.order():
        z = gates_x[start : start + n] + emulator.matmul(h[:n], w_hh.t())
        i, f, new, o = wide(emulator.store(z)).chunk(4, 1)
        state = torch.sigmoid(f) * c[:n].float() + torch.sigmoid(i) * torch.tanh(new)  # pyright: ignore[reportOptionalSubscript]
        cell = emulator.store(state)
        out = emulator.store(torch.sigmoid(o) * torch.tanh(cell.float()))
        out = emulator.store(emulator.matmul(out, w_hr.t()))
        h = torch.cat([out, h[n:]])
        c = torch.cat([cell, c[n:]])  # pyright: ignore[reportOptionalSubscript]
        rows[start] = out
    return torch.cat([rows[k] for k in sorted(rows)]), h, c  # pyright: ignore[reportReturnType]
