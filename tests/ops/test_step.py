"""Steps of Adam, AdamW and SGD on every back end: the bits of torch's own optimizers, and more."""

from __future__ import annotations

import importlib.util
import itertools
import random

import pytest
import torch
from torch import Tensor

from adversarial import bits, same_numbers, specials
from halfstep.errors import OperandError
from halfstep.ops import AdamRule, SgdRule, adam_step, native, sgd_step
from halfstep.ops.step_reference import fused
from halfstep.ops.stepping import _adam_numbers

NATIVE_SETS = [] if native.MISSING else native._core.instruction_sets()
TRITON = ["triton"] if importlib.util.find_spec("triton") else []  # in its interpreter, or on a GPU
KERNELS = [*NATIVE_SETS, *TRITON]
BACKENDS = ["reference", *KERNELS]
# Where torch multiplies and adds in one rounding; elsewhere the last bits are its own.
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
as_torch = pytest.mark.skipif(not FUSES, reason="torch's kernels here have no fused multiply-add")
SHAPES = [(1,), (7,), (0, 3), (5, 13), (2, 3, 4, 5), (), (1003,)]


def on(backend: str, op, *args, **kwargs) -> list[int]:
    if backend in ("reference", "triton"):
        return op(*args, backend=backend, **kwargs)
    with native.instruction_set(backend):
        return op(*args, backend="native", **kwargs)


def numbers(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of all sizes, some 0, some subnormal."""
    found = []
    for g in numbers(100 + step, 3.0):
        generator = torch.Generator().manual_seed(g.numel())
        g = g * 10.0 ** torch.randint(-9, 3, g.shape, generator=generator)
        found.append(torch.where(g.abs() < 1e-8, g * 1e-33, g).to(dtype))
    return found


def same(found: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(found, right, strict=True))


ADAM = {
    "plain": {},
    "decay": {"weight_decay": 0.013},
    "ascent": {"maximize": True, "weight_decay": 0.1},
    "betas": {"betas": (0.3, 0.5), "eps": 1e-3},
    "no momentum": {"betas": (0.0, 0.0)},
    "large": {"lr": 7.0, "weight_decay": 0.3},
}


def whole_vectors(tensors: list[Tensor]) -> list[Tensor]:
    """Without the elements that torch's fused kernels add one by one, in another order."""
    return [t.detach().flatten()[: t.numel() // 16 * 16] for t in tensors]


@as_torch
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ADAM.values(), ids=ADAM)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_has_the_bits_of_torchs_fused_one(kind, options, backend: str):
    parameters = [torch.nn.Parameter(w) for w in numbers(1)]
    options = {"weight_decay": 0.0, **options}
    optimizer = kind(parameters, fused=True, **options)
    w, m, v = numbers(1), [torch.zeros(s) for s in SHAPES], [torch.zeros(s) for s in SHAPES]
    rule = AdamRule(decoupled=kind is torch.optim.AdamW, **options)
    for step in range(1, 6):
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
        counts = on(backend, adam_step, w, gradients(step), m, v, [step] * len(w), rule)
        assert counts == [0] * len(w)
    assert same(whole_vectors(w), whole_vectors(parameters))
    state = [optimizer.state[p] for p in parameters]
    assert same(whole_vectors(m), whole_vectors([s["exp_avg"] for s in state]))
    assert same(whole_vectors(v), whole_vectors([s["exp_avg_sq"] for s in state]))


@as_torch
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", ADAM.values(), ids=ADAM)
def test_adam_is_torchs_but_for_the_square_root(options, foreach: bool, lr):
    """Moments bit for bit, the tails of tensors too. A weight moves by ``u``; of ``u`` torch's square root is
    off by 2^-23, ours by 2^-24, each of three roundings after it by 2^-24 on either side: 4.5 * 2^-23 |u| in
    all, and 2^-24 of the weight on either side."""
    if foreach and isinstance(lr, Tensor):
        return  # torch refuses
    options = {"weight_decay": 0.0, **options, "lr": lr}
    parameters = [torch.nn.Parameter(w) for w in numbers(1)]
    optimizer = torch.optim.AdamW(parameters, foreach=foreach, **options)
    rule = AdamRule(decoupled=True, **options)
    m, v = [torch.zeros(s) for s in SHAPES], [torch.zeros(s) for s in SHAPES]
    for step in range(1, 6):
        w = [p.detach().clone() for p in parameters]
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
        decayed = [x * (1 - lr * rule.weight_decay) for x in w]
        adam_step(w, gradients(step), m, v, [step] * len(w), rule)
        for ours, before, p in zip(w, decayed, parameters, strict=True):
            theirs = p.detach()
            moved = torch.maximum((ours - before).abs(), (theirs - before).abs())
            bound = 4.5 * 2.0**-23 * moved + 2.0**-23 * torch.maximum(ours.abs(), before.abs())
            assert ((ours - theirs).abs() <= bound).all()
    assert same(m, [optimizer.state[p]["exp_avg"] for p in parameters])
    assert same(v, [optimizer.state[p]["exp_avg_sq"] for p in parameters])


SGD = {
    "plain": {},
    "decay": {"weight_decay": 0.013},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "dampened": {"momentum": 0.7, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "ascent": {"momentum": 0.9, "maximize": True, "weight_decay": 0.01},
    "tensor": {"momentum": 0.5, "lr": torch.tensor(3e-2)},
}


@as_torch
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_sgd_has_torchs_bits(options, backend: str):
    parameters = [torch.nn.Parameter(w) for w in numbers(2)]
    options = {"lr": 0.03, **options}
    optimizer = torch.optim.SGD(parameters, **options)
    rule = SgdRule(**options)
    w, buffers = numbers(2), [torch.full(s, torch.nan) for s in SHAPES if rule.momentum]
    for step in range(1, 6):
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
        on(backend, sgd_step, w, gradients(step), buffers, rule, fresh=step == 1)
    assert same(w, [p.detach() for p in parameters])
    if buffers:
        assert same(buffers, [optimizer.state[p]["momentum_buffer"] for p in parameters])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("copy", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradient", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_equal_reference_whatever_the_dtypes(backend, copy, gradient):
    options = {"decoupled": True, "weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}
    for adam, scale in zip(options, (65536.0, 3.0), strict=True):
        results = []
        for where in (backend, "reference"):
            w, m, v = numbers(4), numbers(5), [x.abs() for x in numbers(6)]
            b = numbers(7)
            copies = [torch.full(s, 7.0, dtype=copy) for s in SHAPES] if copy else []
            more = [c.clone() for c in copies]
            for step in (1, 2):
                g = gradients(step, gradient)
                on(
                    where,
                    adam_step,
                    w,
                    g,
                    m,
                    v,
                    [step] * 7,
                    AdamRule(**adam),
                    scale=scale,
                    copies=copies,
                )
                rule = SgdRule(momentum=0.9, weight_decay=0.1, nesterov=step == 1)
                on(where, sgd_step, w, g, b, rule, scale=scale, copies=more)
            results.append([*w, *m, *v, *b, *copies, *more])
        assert same(*results)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("copy", [torch.float16, torch.bfloat16])
def test_copies_are_torchs_casts_of_every_kind_of_number(backend, copy):
    patterns = torch.arange(0, 2**32, 655211, dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = torch.arange(0, 2**16).to(torch.int32) << 16 | 0x8000
    halves = torch.randn(2**16, dtype=torch.float64).half().float().view(torch.int32) | 0x1000
    tiny = torch.arange(0, 2**12, dtype=torch.float32) * 2.0**-26
    w = torch.cat(
        [patterns, ties.view(torch.float32), halves.view(torch.float32), tiny, specials()]
    )
    w = torch.cat([w, -w])
    right = w.to(copy)
    out = torch.empty_like(right)
    for cut in (0, 3):  # aligned, and not: streamed, and not
        part = w[cut:].clone()
        on(backend, sgd_step, [part], [torch.zeros_like(part)], [], SgdRule(), copies=[out[cut:]])
        assert same_numbers(out[cut:], right[cut:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_that_is_not_finite_stops_all(backend: str):
    for bad, dtype in itertools.product(
        (torch.inf, -torch.inf, torch.nan), (torch.float32, torch.half)
    ):
        w, m, v, b = numbers(1), numbers(2), numbers(3), numbers(4)
        copies = [torch.zeros(s, dtype=torch.half) for s in SHAPES]
        g = gradients(1, torch.bfloat16)
        g[6] = g[6].to(dtype)
        g[6][-1] = bad
        counts = on(backend, adam_step, w, g, m, v, [1] * 7, AdamRule(), scale=8.0, copies=copies)
        assert counts == [0, 0, 0, 0, 0, 0, 1]
        assert on(backend, sgd_step, w, g, b, SgdRule(momentum=0.5), copies=copies) == counts
        assert same([*w, *m, *v, *b], [*numbers(1), *numbers(2), *numbers(3), *numbers(4)])
        assert not any(c.any() for c in copies)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_said_to_be_checked_is_not_looked_at(backend: str):
    w = torch.zeros(2)
    assert on(
        backend, sgd_step, [w], [torch.tensor([torch.inf, 0])], [], SgdRule(), checked=True
    ) == [0]
    assert w[0] == -torch.inf


@pytest.mark.parametrize("backend", KERNELS)
def test_any_layout(backend: str):
    """Alike in memory: as it lies. Not alike, with holes, negated, a subclass: the reference."""

    class Own(Tensor):
        pass

    def layouts(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 6, 5, 8, generator=generator)
        return [
            x.clone().to(memory_format=torch.channels_last),
            x.clone().permute(3, 1, 0, 2),
            x.clone()[:, ::2],
            torch._neg_view(x.clone()),
            x.clone().as_subclass(Own),
            x.clone() if seed % 2 else x.clone().transpose(0, 1).contiguous().transpose(0, 1),
        ]

    results = []
    for where in (backend, "reference"):
        w, m, v, g = layouts(1), layouts(2), [abs(x) for x in layouts(3)], layouts(4)
        v = [torch.empty_like(a).copy_(x) for a, x in zip(w, v, strict=True)]
        on(where, adam_step, w, g, m, v, [3] * len(w), AdamRule())
        results.append([x.as_subclass(Tensor).resolve_neg().contiguous() for x in (*w, *m, *v)])
    assert same(*results)


@pytest.mark.parametrize("backend", KERNELS)
def test_tensors_that_share_memory_are_stepped_one_after_another(backend: str):
    """Torch's own order; views of one storage that do not overlap are no such tensors."""
    results = []
    for where in (backend, "reference"):
        whole = torch.ones(2**17 + 64)
        w = [whole[:-64], whole[64:]]
        g = [torch.full((2**17,), 2.0), torch.full((2**17,), 3.0)]
        b = [torch.zeros(2**17), torch.zeros(2**17)]
        on(where, sgd_step, w, g, b, SgdRule(lr=0.25, momentum=0.5))
        results.append([whole, *b])
    assert same(*results)
    assert results[0][0][128] == 1 - 0.5 - 0.75
    core = native.core()
    assert core.disjoint([100, 200, 300], [100, 100, 0], [0, 250 + 50, 0], [100, 900, 50])
    assert not core.disjoint([100, 199], [100, 1], [], [])
    assert not core.disjoint([100], [100], [50], [51])
    assert not core.disjoint([100], [100], [0], [1000])


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_count_and_leaves_may_require_gradients(backend: str):
    w = torch.nn.Parameter(torch.ones(3))
    m, v, c = torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.half)
    before = [t._version for t in (w, m, v, c)]
    on(backend, adam_step, [w], [torch.ones(3)], [m], [v], [1], AdamRule(), copies=[c])
    assert all(t._version > n for t, n in zip((w, m, v, c), before, strict=True))
    assert w.requires_grad
    assert w.grad_fn is None


def test_threads_do_not_change_the_result():
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        w = [torch.full((n,), 1.0) for n in (5, 70_000, 1, 200_001, *[33] * 300)]
        state = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
        g = [torch.linspace(-1, 1, x.numel()) for x in w]
        try:
            adam_step(w, g, *state, [1] * len(w), AdamRule())
        finally:
            torch.set_num_threads(threads)
        results.append([*w, *state[0], *state[1]])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_fused_rounds_once():
    """Against exact rational arithmetic: half-way cases that two roundings would get wrong among them."""
    from fractions import Fraction

    draw = random.Random(5)
    cases = [
        (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60),
        (2.0**-75, 2.0**-75, 2.0**-149),
        (3.0, -1.0, 3.0),
    ]
    for _ in range(400):
        a, b, c = (
            torch.tensor(
                draw.uniform(-2, 2) * 2.0 ** draw.randint(-80, 40), dtype=torch.float32
            ).item()
            for _ in range(3)
        )
        c = draw.choice([c, torch.tensor(-a * b, dtype=torch.float32).item()])
        cases.append((a, b, c))
    for a, b, c in cases:
        found = fused(torch.tensor(a), torch.tensor(b), torch.tensor(c)).item()
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        near = torch.tensor(found)
        steps = [near, *(torch.nextafter(near, torch.tensor(e)) for e in (-torch.inf, torch.inf))]
        distance = [abs(Fraction(x.item()) - exact) for x in steps]
        assert distance[0] == min(distance), (a, b, c)
        if distance[0] in distance[1:]:
            assert near.view(torch.int32) % 2 == 0, (a, b, c)
    inf, nan = torch.tensor(torch.inf), torch.tensor(torch.nan)
    assert fused(inf, torch.tensor(1.0), torch.tensor(1.0)) == torch.inf
    assert fused(inf, torch.tensor(1.0), -inf).isnan()
    assert fused(nan, torch.tensor(1.0), inf).isnan()


def test_numbers_are_computed_as_torch_does():
    """In Python's floats, or in float32 where the learning rate is a tensor."""
    wide = _adam_numbers(AdamRule(lr=0.1), 1.0, [7])
    narrow = _adam_numbers(AdamRule(lr=torch.tensor(0.1)), 1.0, [7])
    assert wide.steps == [torch.tensor(-(0.1 / (1 - 0.9**7)), dtype=torch.float32).item()]
    assert narrow.steps == [-(torch.tensor(0.1) / (1 - 0.9**7)).item()]


ONE = [torch.ones(2)]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: adam_step(ONE, [], ONE, ONE, [1], AdamRule()),
            "adam_step: 1 weights and 0 gradients",
        ),
        (lambda: adam_step(ONE, ONE, ONE, ONE, [], AdamRule()), "adam_step: 1 weights and 0 steps"),
        (
            lambda: adam_step(ONE, ONE, [torch.ones(3)], ONE, [1], AdamRule()),
            "adam_step: means[0] is of shape (3,), its weight of (2,)",
        ),
        (
            lambda: adam_step([torch.ones(2).double()], ONE, ONE, ONE, [1], AdamRule()),
            "adam_step: weights[0] is torch.float64; allowed: torch.float32",
        ),
        (
            lambda: sgd_step(ONE, ONE, [], SgdRule(), copies=ONE),
            "sgd_step: copies[0] is torch.float32; allowed: torch.float16, torch.bfloat16",
        ),
        (
            lambda: sgd_step(ONE, ONE, [], SgdRule(momentum=0.5)),
            "sgd_step: 1 weights and 0 buffers",
        ),
        (
            lambda: sgd_step(ONE, ONE, ONE, SgdRule()),
            "sgd_step: 1 buffers and a momentum of 0; give none",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, text: str):
    with pytest.raises(OperandError) as raised:
        call()
    assert str(raised.value) == text


def test_nothing_to_step():
    assert adam_step([], [], [], [], [], AdamRule()) == []
    assert sgd_step([], [], [], SgdRule()) == []
