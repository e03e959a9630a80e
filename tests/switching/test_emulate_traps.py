"""What a program may do under `halfstep.emulate` besides training: each known trap."""

import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import halfstep
from emulated import data, on_grid, small, trained
from halfstep.errors import SwitchError
from halfstep.switching.emulation import mode

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


def test_the_compiler_sees_nothing_of_an_emulation():
    """Not the emulator's own functions either; and the first operation does not take it in."""
    graphs = []

    def seen(module, inputs):
        graphs.append(module)
        return module.forward

    layer, x = nn.Linear(8, 8), torch.ones(2, 8)
    compiled = torch.compile(lambda x: layer(x).softmax(-1), backend=seen)
    with halfstep.emulate("mxfp8") as emulation:
        out = compiled(x)
        assert torch.equal(out, layer(x).softmax(-1))
        out.sum().backward()
    assert not graphs
    assert emulation.operations["dot"]["aten.addmm.default"] == 2
    program = (
        "import sys, torch, halfstep\n"
        "with halfstep.emulate('fp16'): torch.ones(3) + 1\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("recipe", ["fp16", "fp16-naive", "fp16-acc16", "bf16", "mxfp8", "tf32"])
def test_commonest_products_are_what_all_products_are(recipe: str, monkeypatch: pytest.MonkeyPatch):
    """`mm`, `addmm` and convolutions have ways of their own: the same numbers, roles and scaled gradients."""

    def found() -> list[Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 7, bias=False))
        convolved = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3, bias=False))
        x = torch.randn(33, 40, requires_grad=True)
        with halfstep.emulate(recipe):
            y = torch.addmm(torch.randn(7), model(x), torch.randn(7, 7))
            z = convolved(y.view(3, 1, 7, 11)).mean((2, 3))
            ((y @ y.t()).square().mean() + z.square().sum()).backward()
        parameters = [*model.parameters(), *convolved.parameters()]
        return [y, z, x.grad, *[p.grad for p in parameters]]

    own = found()
    assert set(mode._PRODUCTS) == {
        f"aten.{name}.default" for name in ("mm", "addmm", "convolution")
    }
    monkeypatch.setattr(mode, "_PRODUCTS", {})
    for a, b in zip(own, found(), strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize("recipe", ["bf16-sr", "bf16-kahan", "fp16:moments=bf16"])
def test_what_is_kept_between_steps_is_for_the_switch(recipe):
    with pytest.raises(SwitchError, match=r"state between steps that emulate does not keep"):
        halfstep.emulate(recipe)


@pytest.mark.parametrize(
    "backends", [["FLASH_ATTENTION"], ["MATH"], ["EFFICIENT_ATTENTION", "MATH"]]
)
def test_attention_is_emulated_whatever_kernel_the_program_asks_for(backends):
    """x-transformers and others ask for flash kernels, inside of which nothing can be rounded."""
    wanted = [getattr(torch.nn.attention.SDPBackend, name) for name in backends]
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0))

    def attend():
        x = q.clone().requires_grad_()
        out = torch.nn.functional.scaled_dot_product_attention(x, k, v)
        out.square().sum().backward()
        return out.detach(), x.grad

    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    with halfstep.emulate("fp16"):
        plain = attend()
    with halfstep.emulate("fp16") as emulation, torch.nn.attention.sdpa_kernel(wanted):
        asked = attend()
    for a, b in zip(plain, asked, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(asked[0].half().float(), asked[0])
    assert "in no list" not in str(emulation.summary())
    assert before == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def test_a_model_can_be_copied_where_weights_are_in_16_bits():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with halfstep.emulate("fp16-naive"):
        copied = copy.deepcopy(model)
    assert torch.equal(copied.weight, before.half().float())
