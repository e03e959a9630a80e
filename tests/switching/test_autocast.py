"""``halfstep.autocast``: torch's signature, one op policy on every device, float16 emulated on CPUs."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import halfstep
from against_fp32 import assert_close, batch, mlp
from halfstep.switching.region import current

X, Y = batch()
LOW = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.mark.parametrize("dtype", LOW)
def test_dot_products_are_low_and_the_fp32_class_is_not(dtype):
    a, b = torch.randn(4, 64), torch.randn(64, 8)
    with halfstep.autocast("cpu", dtype=dtype):
        assert current() is not None
        product = a @ b
        assert product.dtype == dtype
        for op in (torch.exp, torch.sum, lambda t: torch.softmax(t, 0), torch.norm, torch.log):
            assert op(product.abs()).dtype == torch.float32, op
        assert torch.relu(product).dtype == dtype
        with halfstep.autocast("cpu", enabled=False):
            assert (a @ b).dtype == torch.float32
        assert (a @ b).dtype == dtype
    assert current() is None
    assert (a @ b).dtype == torch.float32
    wanted = (a.to(dtype).double() @ b.to(dtype).double()).to(torch.float32)
    # sums of 64 in FP32, then one rounding
    eps = torch.finfo(dtype).eps
    assert (product.float() - wanted).abs().max() <= eps * wanted.abs().max()


def test_the_default_dtype_is_torchs():
    with halfstep.autocast("cpu") as entered:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert isinstance(entered, torch.autocast)


@pytest.mark.comparison
def test_torch_computes_softmax_in_float16_on_a_cpu():
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.softmax(torch.ones(2, 2) @ torch.ones(2, 2), 0).dtype == torch.float16


def test_it_decorates_and_heals():
    @halfstep.autocast("cpu", dtype=torch.float16)
    def product(a, fail=False):
        if fail:
            raise KeyboardInterrupt
        return a @ a

    assert product(torch.ones(2, 2)).dtype == torch.float16
    with pytest.raises(KeyboardInterrupt):
        product(torch.ones(2, 2), fail=True)
    assert current() is None
    assert not torch.is_autocast_enabled("cpu")
    assert product(torch.ones(2, 2)).dtype == torch.float16


def test_one_object_serves_again():
    low = halfstep.autocast("cpu", dtype=torch.float16)
    for _ in range(2):
        with low:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
        assert current() is None
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_written_loop_trains_as_fp32(recomputed):
    def run(low):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = halfstep.GradScaler("cpu", init_scale=256.0, enabled=low)
        for _ in range(5):
            optimizer.zero_grad()
            with halfstep.autocast("cpu", dtype=torch.float16, enabled=low):
                if recomputed:
                    out = checkpoint(model, X, use_reentrant=False)
                else:
                    out = model(X)
                loss = (out.float() - Y).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert not low or scaler.last_step.applied
        assert all(p.dtype == torch.float32 for p in model.parameters())
        return {k: p.detach() for k, p in model.named_parameters()}

    assert_close(run(True), run(False), "fp16")


def test_a_switched_model_inside_is_as_it_is_outside():
    def gradients(wrap):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        switch = halfstep.switch(model, optimizer, "fp16")
        with wrap:
            out = model(X)
        assert out.dtype == torch.float32
        (out - Y).square().mean().backward()
        switch.off()
        return [p.grad for p in model.parameters()]

    plain = gradients(contextlib.nullcontext())
    inside = gradients(halfstep.autocast("cpu", dtype=torch.bfloat16))
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


def test_inside_a_switched_model_it_is_an_island():
    class Island(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.seen = []

        def forward(self, x):
            with halfstep.autocast("cpu", enabled=False):
                self.seen.append(self.inner(x.float()).dtype)
            with halfstep.autocast("cpu", dtype=torch.float16):
                self.seen.append(self.inner(x).dtype)
            return self.inner(x)

    model = Island()
    halfstep.switch(model, torch.optim.SGD(model.parameters()), "fp16")
    model(torch.ones(2, 4)).sum().backward()
    assert model.seen == [torch.float32, torch.float16]


def test_integers_and_doubles_go_their_own_way():
    with halfstep.autocast("cpu", dtype=torch.float16):
        double = torch.ones(2, 2, dtype=torch.float64)
        assert (double @ double).dtype == torch.float64
        assert (torch.ones(2, 2).long() @ torch.ones(2, 2).long()).dtype == torch.int64
