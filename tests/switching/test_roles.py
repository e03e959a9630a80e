"""Operands rounded by role: each product of a layer, bit for bit against one made by hand with ops."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import halfstep
from error_bounds import FP32, assert_product, gamma
from halfstep import ops
from halfstep.errors import RecipeError, SwitchError
from halfstep.recipe import recipes

BY_ROLE = [r.name for r in recipes().values() if r.reads_by_role]
TRAINED = [name for name in BY_ROLE if not recipes()[name].inference_only]

Round = Callable[[Tensor, int], Tensor]


def blocks(format: str) -> Round:
    return lambda t, dim: ops.round_blocks(t.float(), format, dim)


def number(format: str) -> Round:
    return lambda t, dim: ops.round_to(t.float(), format)


# recipe -> how its weight, activation and gradient are rounded, as the paper says
BY_HAND: dict[str, tuple[Round, Round, Round]] = {
    "tf32": (number("tf32"), number("tf32"), number("tf32")),
    "fp8": (blocks("e4m3fn@tensor"), blocks("e4m3fn@tensor"), blocks("e5m2@tensor")),
    "fp8-rowwise": (blocks("e4m3fn@row"), blocks("e4m3fn@row"), blocks("e4m3fn@row")),
    "fp8-block:accumulate=fp32,keep=none": (
        blocks("e4m3fn@128x128"),
        blocks("e4m3fn@1x128"),
        blocks("e4m3fn@1x128"),
    ),
    "mxfp8": (blocks("mxfp8_e4m3"), blocks("mxfp8_e4m3"), blocks("mxfp8_e4m3")),
    "mxfp6": (blocks("mxfp6_e3m2"), blocks("mxfp6_e3m2"), blocks("mxfp6_e3m2")),
    "mxfp4:gradient_rounding=nearest": (blocks("mxfp4"), blocks("mxfp4"), blocks("mxfp4")),
    "nvfp4:keep=none,hadamard=0,gradient_rounding=nearest": (
        blocks("nvfp4@16x16"),
        blocks("nvfp4"),
        blocks("nvfp4"),
    ),
    "int8": (blocks("int8@32x32"), blocks("int8@32x32"), blocks("int8@32x32")),
}


def store(recipe: str) -> torch.dtype:
    return torch.float32 if recipe == "tf32" else torch.bfloat16


@pytest.fixture
def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("recipe", BY_HAND)
def test_linear_reads_each_operand_by_its_role_along_the_summed_axis(
    recipe: str, seeded: torch.Generator
):
    of_weight, of_input, of_grad = BY_HAND[recipe]
    low = store(recipe)
    layer = nn.Linear(48, 40, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(40, 48, generator=seeded))
    # Rows of very different sizes: blocks along the wrong axis give other numbers.
    x = torch.randn(33, 48, generator=seeded) * torch.logspace(-3, 3, 33)[:, None]
    x.requires_grad_()
    grad = torch.randn(33, 40, generator=seeded) * torch.logspace(3, -3, 33)[:, None]
    halfstep.switch(layer, None, recipe)
    out = layer(x)
    out.backward(grad)

    w, a, g = (t.detach().to(low) for t in (layer.weight, x, grad))
    F = nn.functional
    assert torch.equal(out, F.linear(of_input(a, 1), of_weight(w, 1)).to(low).float())
    by_hand = F.linear(of_grad(g, 1), of_weight(w.t().contiguous(), 1)).to(low).float()
    assert torch.equal(x.grad, by_hand)  # pyright: ignore[reportArgumentType]
    # Here the kernels add in another order.
    assert_product(layer.weight.grad, of_grad(g, 0).t(), of_input(a, 0), low)


@pytest.mark.parametrize("recipe", BY_HAND)
def test_convolution_has_blocks_along_channels_and_along_the_batch(
    recipe: str, seeded: torch.Generator
):
    of_weight, of_input, of_grad = BY_HAND[recipe]
    low = store(recipe)
    layer = nn.Conv2d(34, 36, 1, bias=False)  # a kernel of 1 is a linear layer at each position
    x = torch.randn(5, 34, 3, 3, generator=seeded).mul_(torch.logspace(-2, 2, 34)[:, None, None])
    x.requires_grad_()
    grad = torch.randn(5, 36, 3, 3, generator=seeded)
    halfstep.switch(layer, None, recipe)
    out = layer(x)
    out.backward(grad)

    w, a, g = layer.weight.detach().to(low), x.detach().to(low), grad.to(low)
    qw = of_weight(w.flatten(1), 1).view_as(w)
    qa = of_input(a.flatten(2), 1).view_as(a)
    rows = out.permute(0, 2, 3, 1).flatten(0, 2)
    assert_product(rows, qa.permute(0, 2, 3, 1).flatten(0, 2), qw.flatten(1).t(), low)
    qg, qa = of_grad(g.flatten(1), 0).view_as(g), of_input(a.flatten(1), 0).view_as(a)
    qg, qa = (t.transpose(0, 1).flatten(1) for t in (qg, qa))
    assert_product(layer.weight.grad.flatten(1), qg, qa.t(), low)


@pytest.mark.parametrize("recipe", ["fp8", "mxfp8"])
def test_attention_rounds_probabilities_as_an_activation(recipe: str, seeded: torch.Generator):
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    _, of_input, _ = BY_HAND[recipe]
    q, k, v = (torch.randn(2, 3, 32, 16, generator=seeded) for _ in range(3))
    model = Attention()
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    halfstep.switch(model, None, recipe)
    out = model(q, k, v)
    lq, lk, lv = (t.bfloat16() for t in (q, k, v))

    def found(result: Tensor, of_operand: Round) -> None:
        """Scores and softmax may be off; where that moves no rounding of a probability, nothing else may."""
        scores = of_operand(lq, -1).double() @ of_operand(lk, -1).double().mT / 4
        magnitude = of_operand(lq, -1).double().abs() @ of_operand(lk, -1).double().abs().mT / 4
        p = torch.softmax(scores, -1)
        # exp of a sum that is off by d is off by d, relative; the row's sum too; then exp's own ulp or
        # two, the sum of 32, the quotient
        d = gamma(18, FP32) * magnitude.amax(-1, keepdim=True)
        off = 2 * d + gamma(2 * 2 + 32 + 1, FP32)
        least, most = (of_operand((p * (1 + way * off)).bfloat16(), -1) for way in (-1, 1))
        wide_v = of_operand(lv, -2).double()
        slack = (most - least).double().abs() @ wide_v.abs()
        assert (slack == 0).float().mean() > 0.5  # most results have one answer
        assert_product(result, least, wide_v, torch.bfloat16, slack)

    found(out, of_input)
    halfstep.switch(kept := Attention(), None, f"{recipe}:keep=products")
    found(kept(lq, lk, lv), lambda t, dim: t.float())


def test_stochastic_gradients_are_right_on_average(seeded: torch.Generator):
    layer = nn.Linear(32, 32, bias=False)
    x = torch.randn(64, 32, generator=seeded, requires_grad=True)
    grad = torch.randn(64, 32, generator=seeded)
    halfstep.switch(layer, None, "mxfp4")
    torch.manual_seed(3)
    draws = 60
    seen = torch.stack([torch.autograd.grad(layer(x), x, grad)[0] for _ in range(draws)])
    assert seen.std(0).max() > 0
    exact = grad.bfloat16().float() @ ops.round_blocks(
        layer.weight.detach().bfloat16().float(), "mxfp4", 0
    )
    # MX's top values saturate by design: those blocks have a bias, and are left out.
    q = grad.bfloat16().float()
    scale = torch.exp2(torch.floor(torch.log2(q.abs().amax(1, keepdim=True))) - 2)
    fits = (q.abs() / scale <= 6).all(1)
    error = (seen.mean(0) - exact)[fits] / (
        seen.std(0)[fits] / draws**0.5 + 2**-9 * exact[fits].abs()
    )
    assert error.abs().max() < 5.5  # sigma, of 2048 elements


def test_hadamard_leaves_the_product_and_is_of_weight_gradients_only(seeded: torch.Generator):
    from halfstep.recipe import Recipe
    from halfstep.switching.operands import Operands

    operands = Operands(Recipe.parse("nvfp4"))
    a, b = torch.randn(7, 50, generator=seeded), torch.randn(50, 9, generator=seeded)
    ta, tb = operands.transformed(a, b)
    assert ta.shape == (7, 64)
    # Each element of ta and tb is a sum of 16 numbers times 1/4, their product one of 64, a @ b one of 50;
    # magnitudes are summed over tiles: |a| |H| |H'| |b|, and |H| |H'| is all ones in a tile.
    tiles = torch.block_diag(*[torch.ones(16, 16)] * 4)[:50, :50]
    bound = gamma(16 + 16 + 64 + 50, FP32) * (a.abs() @ tiles @ b.abs())
    assert ((ta @ tb - a @ b).abs() <= bound).all()
    spike = torch.zeros(16, 1)
    spike[3] = 1.0
    assert torch.equal(operands.transformed(spike.t(), spike)[1].abs(), torch.full((16, 1), 0.25))
    plain, mixed = (nn.Linear(32, 32, bias=False) for _ in range(2))
    mixed.load_state_dict(plain.state_dict())
    text = "nvfp4:keep=none,gradient_rounding=nearest"
    halfstep.switch(plain, None, f"{text},hadamard=0")
    halfstep.switch(mixed, None, text)
    x = torch.randn(32, 32, generator=seeded, requires_grad=True)
    grads = [torch.autograd.grad(m(x).square().sum(), (x, m.weight)) for m in (plain, mixed)]
    assert torch.equal(grads[0][0], grads[1][0])
    assert not torch.equal(grads[0][1], grads[1][1])


def test_delayed_scales_come_from_the_steps_before(seeded: torch.Generator):
    layer = nn.Linear(16, 16, bias=False)
    switch = halfstep.switch(layer, None, "fp8-delayed:amax_history=2")
    w = layer.weight.detach().bfloat16().float()
    amax_w = w.abs().max()
    seen = []
    for k in range(4):
        x = (torch.randn(8, 16, generator=seeded) * 10.0**k).bfloat16().float()
        out = layer(x)
        past = seen[-2:]
        scale_x = max(past) / 448 if past else torch.tensor(1.0)
        scale_w = amax_w / 448 if past else torch.tensor(1.0)
        qx = ops.round_to(x / scale_x, "e4m3fn") * scale_x
        qw = ops.round_to(w / scale_w, "e4m3fn") * scale_w
        assert torch.equal(out, nn.functional.linear(qx, qw).bfloat16().float())
        seen.append(x.abs().max())
    state = switch.state_dict()["amax_history"]
    assert set(state) == {"weight.activation", "weight.weight"}
    assert torch.equal(state["weight.activation"], torch.stack(seen[-2:]))
    again = copy.deepcopy(layer)
    other = halfstep.switch(again, None, "fp8-delayed:amax_history=2")
    other.load_state_dict(switch.state_dict())
    assert torch.equal(again(x), layer(x))


def test_a_history_keeps_no_infinity_and_hides_none():
    layer = nn.Linear(4, 4, bias=False)
    halfstep.switch(layer, None, "fp8-delayed")
    assert layer(torch.full((2, 4), torch.inf)).isnan().all()
    layer(torch.ones(2, 4))
    assert layer(torch.ones(2, 4)).isfinite().all()


def test_signs_pass_gradients_between_minus_one_and_one_only():
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.2, 1.5], [-0.3, 2.0, 0.1]]))
    halfstep.switch(layer, None, "binary:keep=none")
    x = torch.tensor([[0.4, -3.0, 0.9]], requires_grad=True)
    out = layer(x)
    assert out.tolist() == [[3.0, -1.0]]
    out.backward(torch.tensor([[1.0, 2.0]]))
    assert x.grad.tolist() == [[-1.0, 0.0, 3.0]]  # pyright: ignore[reportOptionalMemberAccess]
    assert layer.weight.grad.tolist() == [[1.0, -1.0, 0.0], [2.0, 0.0, 2.0]]  # pyright: ignore[reportOptionalMemberAccess]


def test_kept_layers_are_in_the_store_format(seeded: torch.Generator):
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(7)))
    halfstep.switch(model, None, "mxfp4:keep=first+last15%")
    x = torch.randn(8, 32, generator=seeded).bfloat16()
    h = x
    for k, layer in enumerate(model):
        w = layer.weight.detach().bfloat16().float()
        kept = k in (0, 5, 6)  # 15 % of 7, rounded up
        a = h.float() if kept else ops.round_blocks(h.float(), "mxfp4", -1)
        h = nn.functional.linear(a, w if kept else ops.round_blocks(w, "mxfp4", -1)).bfloat16()
    assert torch.equal(model(x.float()), h.float())


def test_chunk64_multiplies_e5m2_and_adds_in_e6m9(seeded: torch.Generator):
    layer = nn.Linear(200, 16, bias=False)
    halfstep.switch(layer, None, "fp8-chunk64:keep=none")
    x = torch.rand(4, 200, generator=seeded)
    expected = halfstep.matmul(
        x.half().float(),
        layer.weight.detach().half().float().t(),
        operands="e5m2",
        accumulate="e6m9/chunk64",
    )
    assert torch.equal(layer(x), expected.half().float())


# -- programs ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 64, 64)
        self.norm2 = nn.BatchNorm1d(64)
        self.middle = nn.Linear(64, 64)
        self.norm3 = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(images))).flatten(1)
        h = torch.tanh(self.norm2(self.hidden(h)))
        h = torch.tanh(self.norm3(self.middle(h)))
        return self.head(h)


@pytest.mark.parametrize(
    "recipe",
    [name if name == "mxfp8" else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED],
)
def test_every_recipe_learns_handwritten_digits(recipe: str):
    datasets = pytest.importorskip("sklearn.datasets")
    torch.manual_seed(0)
    digits = datasets.load_digits()
    x = torch.tensor(digits.images[:128], dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target[:128])
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    switch = halfstep.switch(model, optimizer, recipe)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert switch.skipped_steps == 0
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", ["fp8", "mxfp8", "int8", "tf32", "binary:keep=none"])
def test_checkpointing_changes_no_gradient(recipe: str, reentrant: bool, seeded: torch.Generator):
    class Half(nn.Module):
        def __init__(self, save: bool) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            self.save = save

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.save else self.body(x)

    x = torch.randn(8, 16, generator=seeded, requires_grad=True)
    first, second = Half(False), Half(True)
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        halfstep.switch(model, None, recipe)
        model(x).square().sum().backward()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # pyright: ignore[reportArgumentType]


def test_a_tied_weight_is_one_weight_and_rounded_once_a_forward(seeded: torch.Generator):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16, bias=False)
            self.b = nn.Linear(16, 16, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model = Tied()
    halfstep.switch(model, None, "mxfp8")
    x = torch.randn(8, 16, generator=seeded)
    outs = [model(x) for _ in range(3)]  # from the third on, what the two share is kept
    assert torch.equal(outs[0], outs[2])
    grads = [torch.autograd.grad(out.sum(), model.a.weight)[0] for out in outs]
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "binary"])
def test_frozen_layers_and_no_grad(recipe: str, seeded: torch.Generator):
    model = nn.Sequential(
        nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    model[2].requires_grad_(False)
    halfstep.switch(model, None, recipe)
    x = torch.randn(8, 16, generator=seeded)
    out = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), out)
    with torch.inference_mode():
        assert torch.equal(model(x), out)
    out.sum().backward()
    assert model[2].weight.grad is None
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("recipe", ["fp8", "mxfp8", "fp8-delayed"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_follow_fp32(recipe: str, kind: type[nn.Module], seeded: torch.Generator):
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(16, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    torch.manual_seed(1)
    plain = Sequence()
    switched = copy.deepcopy(plain)
    halfstep.switch(switched, None, recipe)
    x = torch.randn(4, 9, 16, generator=seeded)
    results = [(m(x), m) for m in (plain, switched)]
    for out, _ in results:
        out.square().sum().backward()
    (a, first), (b, second) = results
    # Two operands of 4 digits (E4M3) in each product; in a backward one of 3 (E5M2) where the recipe has it.
    # Relative to sums of magnitudes: without cancellation, which tanh's slope of at most 1 makes up for.
    forward = (1 + 2**-4) ** 2 - 1
    assert 0 < (a - b).norm() / a.norm() < forward
    backward = (1 + forward) * (1 + 2**-3) - 1
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert (p.grad - q.grad).norm() / p.grad.norm() < backward  # pyright: ignore[reportOptionalMemberAccess, reportOperatorIssue]


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.Conv1d(6, 6, 3, padding=1)])
def test_double_backward(layer: nn.Module, seeded: torch.Generator):
    layer = copy.deepcopy(layer)
    model = nn.Sequential(layer, nn.Tanh(), copy.deepcopy(layer))
    halfstep.switch(model, None, "mxfp8")
    x = torch.randn(6, 6, generator=seeded, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (layer.weight, x))


def test_inference_only_recipes_refuse_an_optimizer():
    for name in ("int8-inference", "int4-inference", "binary-inference"):
        layer = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
        with pytest.raises(SwitchError, match="for inference only and was given an optimizer"):
            halfstep.switch(layer, torch.optim.SGD(layer.parameters(), 0.1), name)
        plain = copy.deepcopy(layer)
        halfstep.switch(layer, None, name)
        with torch.no_grad():
            out, exact = layer(torch.eye(16)), plain(torch.eye(16))
        assert out.isfinite().all()
        assert not torch.equal(out, exact)
        if "binary" not in name:
            # three layers of weights with 15 steps to a row's amax: half a step, 1/14 of it, each
            assert (out - exact).norm() / exact.norm() < (1 + 1 / 14) ** 3 - 1


def test_a_format_without_executor_and_bad_options_are_errors():
    with pytest.raises(SwitchError, match="store=e4m3fn has no executor"):
        halfstep.switch(nn.Linear(2, 2), None, "fp8:store=e4m3fn")
    for text in (
        "fp8:keep=middle",
        "fp8:hadamard=3",
        "mxfp8:amax_history=4",
        "fp8:inference_only=no",
    ):
        with pytest.raises(RecipeError):
            halfstep.Recipe.parse(text)
    assert str(halfstep.Recipe.parse("fp16:operands=mxfp8_e4m3")) == (
        "fp16:weight=mxfp8_e4m3,activation=mxfp8_e4m3,gradient=mxfp8_e4m3"
    )
