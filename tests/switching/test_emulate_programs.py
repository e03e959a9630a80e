"""Whole programs under `halfstep.emulate`: what a script may do must work, and be in the recipe's numbers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep
from emulated import data, on_grid, small, trained
from halfstep.errors import NonFiniteError, SwitchError

# -- training loops -------------------------------------------------------------------------------------


class Gpt(nn.Module):
    """As in a small GPT: tied table, pre-norm blocks, causal attention, generation."""

    def __init__(self, width=16, vocabulary=13, length=8):
        super().__init__()
        self.table, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm1, self.norm2, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight
        self.drop = nn.Dropout(0.1)

    def forward(self, tokens, targets=None):
        n, length = tokens.shape
        x = self.drop(self.table(tokens) + self.places(torch.arange(length)))
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        x = self.last(x + self.mlp(self.norm2(x)))
        logits = self.head(x)
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


@pytest.mark.parametrize(
    "recipe", ["fp16", "bf16", "fp32:operands=e4m3fn,store=bf16", "fp16:policy=paper"]
)
def test_a_language_model_trains_as_in_fp32(recipe):
    text = torch.arange(400) % 13

    def run(context):
        torch.manual_seed(0)
        with context:
            model = Gpt()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
            for step in range(40):
                start = torch.arange(8)[:, None] + 7 * step % 300
                batch = text[start + torch.arange(9)]
                loss = model(batch[:, :-1], batch[:, 1:])
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            model.eval()
            with torch.no_grad():
                probabilities = model(batch[:1, :-1])[:, -1].softmax(-1)
                torch.multinomial(probabilities, 1)
        return loss.item(), model

    plain, _ = run(torch.enable_grad())
    emulation = halfstep.emulate(recipe)
    loss, model = run(emulation)
    assert plain < 0.3 and loss < plain + 0.2
    assert emulation.unknown == ()
    assert not on_grid(model.table.weight, "bf16")  # masters
    assert emulation.summary().steps == 40


def test_plain_fp16_fails_where_it_is_known_to():
    """AdamW in fp16: its epsilon, 1e-8, is zero there, and zero gradients divide by it."""
    model = small()
    with halfstep.emulate("fp16-naive"):
        trained(model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False), 3)
    with_larger = small()
    with halfstep.emulate("fp16-naive") as emulation:
        optimizer = torch.optim.AdamW(with_larger.parameters(), lr=1e-3, eps=1e-4)
        trained(with_larger, optimizer, 3)
    assert all(on_grid(p) for p in with_larger.parameters())
    assert all(on_grid(s["exp_avg"]) for s in optimizer.state.values())
    assert all(p.isfinite().all() for p in with_larger.parameters())
    assert emulation.loss_scale == 1.0


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p, **k: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, **k),
        lambda p, **k: torch.optim.AdamW(p, lr=0.02, eps=1e-4, **k),
        lambda p, **k: torch.optim.RMSprop(p, lr=0.01, eps=1e-4, **k),
        lambda p, **k: torch.optim.Adagrad(p, lr=0.1, eps=1e-4, **k),
        lambda p, **k: torch.optim.NAdam(p, lr=0.02, eps=1e-4, **k),
    ],
    ids=["SGD", "AdamW", "RMSprop", "Adagrad", "NAdam"],
)
def test_optimizers_in_fp16_keep_weights_and_state_on_the_grid(make, foreach):
    model = small()
    with halfstep.emulate("fp16-naive"):
        optimizer = make(model.parameters(), foreach=foreach)
        first, last = trained(model, optimizer, 20)
    assert last < first
    for p in model.parameters():
        assert p.dtype == torch.float32 and on_grid(p) and on_grid(p.grad)
        for value in optimizer.state[p].values():
            if isinstance(value, torch.Tensor) and value.dim():
                assert on_grid(value)


def test_fused_adamw_in_fp16():
    model = small()
    with halfstep.emulate("fp16-naive"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-4, fused=True)
        first, last = trained(model, optimizer, 20)
    assert last < first and all(on_grid(p) for p in model.parameters())


@pytest.mark.parametrize("recipe, lower", [("fp16", 0.2), ("bf16", 0.3), ("fp16-naive", 0.5)])
def test_lbfgs_in_float64(recipe, lower):
    """FP64 carriers; the closure is emulated although the optimizer's own arithmetic is exempt."""
    model = small().double()
    x, y = (t.double() for t in data())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    with halfstep.emulate(recipe) as emulation:

        def closure():
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        first = closure().item()
        for _ in range(6):
            optimizer.step(closure)
        last = closure().item()
        out = model(x)
    assert out.dtype == torch.float64 and on_grid(out, "fp16" if "fp16" in recipe else "bf16")
    assert last < lower * first
    assert emulation.operations["dot"]["aten.addmm.default"] > 20


@pytest.mark.parametrize("recipe", ["fp16-naive", "fp16"])
def test_a_script_with_autocast_and_a_grad_scaler(recipe):
    """A recipe with a scale of its own has the scaler off; in one without it is the script's."""
    x, y = data()
    torch.manual_seed(0)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    with halfstep.emulate(recipe) as emulation:
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x)
                loss = F.mse_loss(out, y)
            assert out.dtype == torch.float32 and on_grid(out)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
    assert loss < 0.8 * F.mse_loss(small()(x), y)
    summary = emulation.summary()
    assert summary.autocast and "no effect" in str(summary)
    assert summary.grad_scaler == (recipe == "fp16")
    assert (scaler.get_scale() > 2.0**10) == (recipe == "fp16-naive")


def test_manual_updates_keep_fp32_masters_and_true_gradients():
    """w -= lr * grad, with no optimizer and no module: nobody skips steps, so the scale is 1."""
    x, y = data()
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 3) / 2)
    with halfstep.emulate("fp16") as emulation:
        losses = []
        for _ in range(40):
            loss = F.mse_loss(x @ w, y)
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                w -= 0.1 * w.grad
                w.grad.zero_()
        assert emulation.loss_scale == 1.0
    assert losses[-1] < 0.2 * losses[0]
    assert not on_grid(w)
    naive = nn.Parameter(torch.ones(4, 4))
    with halfstep.emulate("fp16-naive"):
        for _ in range(100):
            with torch.no_grad():
                naive -= 1e-4 * torch.ones(4, 4)
    assert torch.equal(naive, torch.ones(4, 4))  # swallowed: half of fp16's step below 1 is 2.4e-4
    with halfstep.emulate("fp16"):
        for _ in range(100):
            naive.data.add_(torch.full((4, 4), -1e-4))
    assert torch.allclose(naive, torch.full((4, 4), 0.99), atol=1e-5)


def test_a_step_that_overflows_is_skipped_and_the_scale_goes_down():
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    with halfstep.emulate("fp16") as emulation:
        (model(torch.ones(1, 4)) * 8.0).sum().backward()  # 8 * 65536 is beyond fp16
        optimizer.step()
        assert not emulation.last_step.applied and emulation.loss_scale == 32768.0
        assert torch.equal(model.weight, before)
        for _ in range(5):
            optimizer.zero_grad()
            (model(torch.ones(1, 4)) * 8.0).sum().backward()
            optimizer.step()
    assert emulation.last_step.applied
    assert torch.equal(model.weight.grad, torch.full((1, 4), 8.0))  # true, whatever the scale
    assert emulation.summary().skipped_steps == 4


def test_gradients_that_no_scale_mends_are_an_error_that_says_so():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with halfstep.emulate("bf16"):
        (model(torch.ones(1, 4)) * torch.inf).sum().backward()
        with pytest.raises(NonFiniteError):
            optimizer.step()


def test_a_switched_model_is_refused_and_one_switched_off_is_not():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, "fp16:initial=1024")
    said = r"switched to fp16:initial=1024 was called inside halfstep\.emulate\(bf16\).*call switch\.off\(\)"
    with halfstep.emulate("bf16"), pytest.raises(SwitchError, match=said):
        model(torch.ones(2, 4))
    with halfstep.emulate("fp32"):  # which changes nothing
        model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert switch.last_step.applied
    switch.off()
    with halfstep.emulate("bf16") as emulation:
        model(torch.ones(2, 4)).sum().backward()
    assert emulation.operations


def test_a_loss_made_of_gradients_that_the_scale_made_inf_lowers_the_scale():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(6, 4).requires_grad_()
    with halfstep.emulate("fp16") as emulation:
        for _ in range(8):
            optimizer.zero_grad()
            (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            (g.norm(dim=1) - 1).square().mean().backward()
            optimizer.step()
    assert emulation.last_step.applied
    assert 1 <= emulation.summary().skipped_steps < 6
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("recipe", ["fp16-naive", "fp16-noscale", "bf16", "fp8"])
def test_steps_are_counted_in_every_recipe(recipe):
    model = nn.Linear(3, 2)
    with halfstep.emulate(recipe) as emulation:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.ones(2, 3)).mean().backward()
            optimizer.step()
    assert emulation.summary().steps == 3
    assert "3 steps, 0 skipped, loss scale 1" in str(emulation.summary())
