"""Whole programs under `halfstep.emulate`: what a script may do must work, and be in the recipe's numbers."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import halfstep
from halfstep.errors import NonFiniteError


def on_grid(t, format="fp16"):
    return torch.equal(t, halfstep.round_to(t.detach(), format))


def data(n=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, x @ torch.randn(6, 3, generator=generator)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))


def trained(model, optimizer, steps=30, closure=False):
    x, y = data()

    def evaluate():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    first = evaluate().item()
    for _ in range(steps):
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    return first, evaluate().item()


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


# -- the traps ------------------------------------------------------------------------------------------


def test_single_numbers_are_wide_and_finite_fills_saturate():
    with halfstep.emulate("fp16-naive"):
        total = torch.ones(70000).sum()
        assert total.item() == 70000.0  # beyond fp16
        scores = torch.zeros(2, 3).masked_fill(
            torch.eye(2, 3).bool(), torch.finfo(torch.float32).min
        )
        assert scores[0, 0] == -65504.0
        assert scores.softmax(-1).isfinite().all()
        masked = torch.where(torch.eye(2).bool(), torch.zeros(2, 2), torch.tensor(-3e38))
        assert masked[0, 1] == -65504.0
        assert torch.zeros(2).fill_(-torch.inf)[0] == -torch.inf


def test_random_numbers_are_drawn_in_fp32_and_rounded():
    torch.manual_seed(3)
    plain = torch.empty(64).uniform_()
    normal = torch.randn(64)
    with halfstep.emulate("fp16-naive"):
        torch.manual_seed(3)
        assert torch.equal(torch.empty(64).uniform_(), plain.half().float())
        assert torch.equal(torch.randn(64) * 1.0, normal.half().float())


@pytest.mark.parametrize("recipe", ["fp16", "fp16-naive", "bf16"])
def test_batch_norm_keeps_its_statistics_in_fp32(recipe):
    layer = nn.BatchNorm1d(4)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).half().bfloat16().float()
    twin = copy.deepcopy(layer)
    x.requires_grad_()
    wide = torch.autograd.grad(twin(x).pow(2).sum() / 2, [twin.weight])[0]
    with halfstep.emulate(recipe):
        out = layer(x * 1.0)
        saved = out.grad_fn._saved_result1
        ((out * out).sum() / 2).backward()
    assert torch.allclose(saved, x.mean(0), rtol=0, atol=1e-6)
    assert torch.allclose(layer.weight.grad, wide, rtol=2.0**-5)
    kept_low = on_grid(layer.running_var)
    assert kept_low == (recipe == "fp16-naive")


def test_islands_of_the_users_compute_in_fp32_where_the_recipe_has_any():
    x = torch.full((4,), 300.0)
    with halfstep.emulate("fp16"):
        low = nn.Identity()(torch.eye(4) @ x)
        assert (low * low)[0] == torch.inf
        assert (low.float() * low.float())[0] == 90000.0
        assert (low.to(torch.float32) * 300)[0] == 90000.0
    with halfstep.emulate("fp16-naive"):
        assert (x.float() * x.float())[0] == torch.inf  # documented: below autograd it is nothing
        assert (x.double() * x.double()).dtype == torch.float64


def test_threads_run_in_it_and_workers_do_not():
    found = {}

    def work():
        x = torch.full((2,), 2048.0, requires_grad=True)
        y = x + 1
        y.sum().backward()
        found["y"], found["grad"] = y.detach(), x.grad

    with halfstep.emulate("fp16-naive"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        loader = DataLoader(TensorDataset(torch.full((4, 2), 2049.0)), batch_size=2, num_workers=1)
        batches = [batch for (batch,) in loader]
    assert found["y"].tolist() == [2048.0, 2048.0]
    assert all(torch.equal(batch, torch.full((2, 2), 2049.0)) for batch in batches)
    work()
    assert found["y"].tolist() == [2049.0, 2049.0]


def test_compiled_functions_run_eagerly_in_it():
    compiled = torch.compile(lambda x: torch.sin(x) + 1, backend="eager")
    x = torch.linspace(0, 3, 16)
    with halfstep.emulate("fp16-naive") as emulation:
        out = compiled(x)
    assert torch.equal(out, (torch.sin(x.half()) + 1).float())
    assert emulation.operations["own"]["aten.add.Tensor"] == 1


def test_views_in_place_writes_out_and_setitem_round_what_they_write():
    with halfstep.emulate("fp16-naive"):
        x = torch.zeros(4, 4)
        x[1:3, 1] = torch.full((2,), 2049.0)
        x[0].add_(4099.0)
        x.t()[3].copy_(torch.tensor([8195.0] * 4))
        out = torch.empty(4, 4)
        torch.add(x, 1.0, out=out)
        y = torch.zeros(3)
        torch.matmul(torch.eye(3), torch.full((3,), 2049.0), out=y)
        z = torch.zeros(2, 2).addmm_(torch.eye(2), torch.full((2, 2), 2049.0))
    assert on_grid(x) and on_grid(out) and on_grid(z)
    assert x[1, 1] == 2048.0 and x[0, 0] == 4100.0 and x[0, 3] == 8192.0
    assert y.tolist() == [2048.0] * 3 and z[0, 0] == 2048.0


def test_sparse_embedding_gradients_and_complex_numbers():
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    with halfstep.emulate("fp16"):
        table(torch.tensor([1, 1, 3])).pow(2).mean().backward()
        assert table.weight.grad.is_sparse
        optimizer.step()
        z = torch.randn(4, dtype=torch.complex64)
        assert torch.equal(z * z, z * z)
        spectrum = torch.fft.rfft(torch.randn(8))
        assert spectrum.is_complex()


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own, in torch.func.jvp
def test_double_backward_checkpoint_custom_functions_and_func_transforms():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    x, y = data()
    for recipe in ("fp16:initial=1024", "bf16", "fp16-naive"):
        grid = "bf16" if recipe == "bf16" else "fp16"
        tolerance = 2.0**-4 if grid == "bf16" else 2.0**-7
        results = {}
        for name, context in (("fp32", torch.enable_grad()), ("low", halfstep.emulate(recipe))):
            model = small()
            torch.optim.SGD(model.parameters(), lr=0.1)
            with context:
                inputs = x.clone().requires_grad_()
                out = model[2](checkpoint(model[:2], inputs, use_reentrant=False))
                (slope,) = torch.autograd.grad(out.mean(), inputs, create_graph=True)
                loss = (
                    F.mse_loss(out, y)
                    + (10 * slope).pow(2).sum(1).mean()
                    + Square.apply(out).mean()
                )
                loss.backward()
                single = torch.func.vmap(torch.func.grad(lambda t, model=model: model(t).sum()))(x)
                _, tangent = torch.func.jvp(torch.tanh, (x,), (x,))
            results[name] = [p.grad for p in model.parameters()] + [single, tangent]
        for wide, low in zip(results["fp32"], results["low"], strict=True):
            assert (wide - low).norm() <= tolerance * wide.norm()
        if recipe == "fp16-naive":
            assert on_grid(results["low"][-1], grid)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant):
    x, y = data()
    found = []
    for around in (lambda f, t: f(t), lambda f, t: checkpoint(f, t, use_reentrant=reentrant)):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with halfstep.emulate("fp16:initial=1024"):
            inputs = x.clone().requires_grad_()
            F.mse_loss(model[2](around(model[:2], inputs)), y).backward()
        found.append([p.grad for p in model.parameters()])
        del optimizer
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_copies_saving_and_loading(tmp_path):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with halfstep.emulate("fp16"):
        trained(model, optimizer, 2)
        twin = copy.deepcopy(model)
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt"
        )
        state = torch.load(tmp_path / "c.pt")
        twin.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    for key, value in model.state_dict().items():
        assert torch.equal(average[key], value)  # masters are copied in full
    assert not on_grid(average["0.weight"])


def test_formats_that_torch_has_not():
    x, y = data()
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with halfstep.emulate("fp32:operands=e4m3fn,store=e6m9") as emulation:
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            out = model(x)
            loss = F.mse_loss(out, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert on_grid(out, "e6m9") and not on_grid(out, "e4m3fn")
        product = torch.full((1, 1), 1.06) @ torch.ones(1, 1)
        assert product.item() == 1.0  # e4m3fn, whose step there is 1/8
        series = nn.LSTM(3, 4, batch_first=True)
        hidden, _ = series(torch.randn(2, 5, 3))
        assert on_grid(hidden, "e6m9")
    assert losses[-1] < 0.5 * losses[0]
    counts = emulation.operations["dot"]
    assert sum(counts.values()) > 5 * 2  # every time step is seen


def test_decorator_nesting_and_the_way_back():
    @halfstep.emulate("fp16-naive")
    def naive(x):
        inner = halfstep.emulate("bf16:policy=paper")
        with inner:
            low = x + 1
        return low, x + 1

    x = torch.full((1,), 256.0)
    for _ in range(2):
        low, high = naive(x)
        assert low.item() == 256.0 and high.item() == 257.0  # bf16 and fp16
    before = torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(KeyError), halfstep.emulate("fp16"):
        raise KeyError
    assert (torch.full((1,), 2048.0) + 1).item() == 2049.0
    assert torch.backends.cuda.flash_sdp_enabled() == before
    assert "to" not in torch.Tensor.__dict__ and "lstm" not in torch._VF.__dict__


def test_a_step_that_raises_leaves_the_emulation_on():
    class Broken(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            raise ValueError

    model = small()
    optimizer = Broken(model.parameters(), lr=0.1)
    with halfstep.emulate("fp16"):
        with pytest.raises(ValueError):
            optimizer.step()
        low = torch.eye(2) @ torch.full((2, 2), 2049.0)
    assert low[0, 0] == 2048.0


def test_what_no_list_knows_is_named_once():
    library = torch.library.Library("halfstep_tests", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2 + 1, "CPU")
    with (
        pytest.warns(RuntimeWarning, match="halfstep_tests.twice"),
        halfstep.emulate("fp16-naive") as it,
    ):
        out = torch.ops.halfstep_tests.twice(torch.full((1,), 1024.0))
    assert out.item() == 2048.0 and it.unknown == ("halfstep_tests.twice.default",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with it:
            torch.ops.halfstep_tests.twice(torch.full((1,), 1024.0))
    library._destroy()


def test_explain_and_summary_say_what_was_done():
    with halfstep.emulate("fp16-naive") as emulation:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert emulation.operations["dot"] == {"aten.mm.default": 1}
    text = str(emulation.explain())
    assert "dot" in text and "fp16" in text and "optimizer" in text
    assert "dot: 1 (mm.default 1)" in str(emulation.summary())
    assert emulation.summary().as_dict()["operations"]["dot"] == {"aten.mm.default": 1}


def test_fp32_changes_nothing():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with halfstep.emulate("fp32") as emulation:
        out = x @ x
    assert torch.equal(out, x @ x) and emulation.operations["dot"] == {"aten.mm.default": 1}
