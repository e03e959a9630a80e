"""An optimizer's step in one pass: twins of halfstep/ops/step_reference.py, in its order of operations.

Launched without fusion: only what `fma_nearest` says is rounded once.
"""

# What is here is compiled by Triton, which may not be installed; its constants have our attributes.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl

from halfstep.ops.triton_kernels.fma import fma_nearest
from halfstep.ops.triton_kernels.gradients import pointer
from halfstep.ops.triton_kernels.rounding import from_bits, round_bits, to_bits

__all__ = ["adam_kernel", "sgd_kernel"]


@triton.jit
def adam_kernel(
    gradients,
    sizes,
    which,
    begins,
    weights,
    means,
    squares,
    copies,
    roots,
    steps,
    scale,
    penalty,
    decay,
    moment,
    rest,
    beta2,
    square,
    eps,
    rule: tl.constexpr,
    number: tl.constexpr,
    copy: tl.constexpr,
    to: tl.constexpr,
    aligned: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of Adam: see `halfstep.ops.adam_step`. ``copy`` is the type of the copies, or None."""
    tensor = tl.load(which + tl.program_id(0))
    begin = tl.load(begins + tl.program_id(0))
    size = tl.load(sizes + tensor)
    root, step = tl.load(roots + tensor), tl.load(steps + tensor)
    g_ptr = pointer(gradients, tensor, number, aligned)
    w_ptr = pointer(weights, tensor, tl.float32, aligned)
    m_ptr = pointer(means, tensor, tl.float32, aligned)
    v_ptr = pointer(squares, tensor, tl.float32, aligned)
    for _ in range(0, PART, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < size
        w = tl.load(w_ptr + at, mask=mask, other=0.0)
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        g = _gradient(tl.load(g_ptr + at, mask=mask, other=0.0), w, scale, penalty, rule)
        if rule.decays:
            w = w * decay
        ahead = g - m
        if rule.near:  # from the end that is nearer
            m = fma_nearest(_all(moment, m), ahead, m)
        else:
            m = fma_nearest(_all(rest, m), ahead, g)
        v = fma_nearest(g * square, g, v * beta2)
        below = tl.div_rn(tl.sqrt_rn(v), _all(root, v)) + eps
        w = w + tl.div_rn(m * step, below)
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
        tl.store(w_ptr + at, w, mask=mask)
        if copy is not None:
            _store_copy(copies, tensor, at, mask, w, copy, to, aligned)
        begin += BLOCK


@triton.jit
def sgd_kernel(
    gradients,
    sizes,
    which,
    begins,
    weights,
    means,
    copies,
    scale,
    penalty,
    momentum,
    gain,
    step,
    rule: tl.constexpr,
    number: tl.constexpr,
    copy: tl.constexpr,
    to: tl.constexpr,
    aligned: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of SGD: see `halfstep.ops.sgd_step`."""
    tensor = tl.load(which + tl.program_id(0))
    begin = tl.load(begins + tl.program_id(0))
    size = tl.load(sizes + tensor)
    g_ptr = pointer(gradients, tensor, number, aligned)
    w_ptr = pointer(weights, tensor, tl.float32, aligned)
    for _ in range(0, PART, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < size
        w = tl.load(w_ptr + at, mask=mask, other=0.0)
        g = _gradient(tl.load(g_ptr + at, mask=mask, other=0.0), w, scale, penalty, rule)
        if rule.has_momentum:
            m_ptr = pointer(means, tensor, tl.float32, aligned)
            m = g
            if not rule.fresh:
                old = tl.load(m_ptr + at, mask=mask, other=0.0)
                m = fma_nearest(g, _all(gain, g), old * momentum)
            tl.store(m_ptr + at, m, mask=mask)
            if rule.nesterov:
                g = fma_nearest(m, _all(momentum, m), g)
            else:
                g = m
        w = fma_nearest(g, _all(step, g), w)
        tl.store(w_ptr + at, w, mask=mask)
        if copy is not None:
            _store_copy(copies, tensor, at, mask, w, copy, to, aligned)
        begin += BLOCK


@triton.jit
def _gradient(x, w, scale, penalty, rule: tl.constexpr):
    """As the step takes it: over the scale, of the sign that descends, with the penalty."""
    g = to_bits(x).to(tl.float32, bitcast=True)
    if rule.scales:
        g = tl.div_rn(g, _all(scale, g))
    if rule.maximize:
        g = -g
    if rule.penalizes:
        g = fma_nearest(w, _all(penalty, w), g)
    return g


@triton.jit
def _all(number, like):
    return tl.full(like.shape, 0.0, tl.float32) + number


@triton.jit
def _store_copy(
    copies, tensor, at, mask, w, copy: tl.constexpr, to: tl.constexpr, aligned: tl.constexpr
):
    bits = to_bits(w)
    rounded = round_bits(bits, tl.zeros_like(bits).to(tl.uint32), to)
    tl.store(pointer(copies, tensor, copy, aligned) + at, from_bits(rounded, copy), mask=mask)
