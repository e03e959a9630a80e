"""Attention: the function with masks, causal, grouped heads; the layers, with torch's fused path shut."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twins import RECIPES, check, on

pytestmark = pytest.mark.parametrize("recipe", RECIPES)
K = 10


class Attend(nn.Module):
    """Attention between projections; ``how(q, k, v)`` calls the function."""

    def __init__(self, how, heads=2, groups=2):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, n * 4) for n in (heads, groups, groups))
        self.out = nn.Linear(heads * 4, 8)
        self.how, self.heads, self.groups = how, heads, groups

    def forward(self, x, mask=None):
        q = self.q(x).unflatten(-1, (self.heads, 4)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.groups, 4)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.groups, 4)).transpose(1, 2)
        y = self.how(q, k, v) if mask is None else self.how(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


attention = F.scaled_dot_product_attention
HOWS = {
    "plain": lambda q, k, v: attention(q, k, v),
    "causal": lambda q, k, v: attention(q, k, v, is_causal=True),
    "scaled": lambda q, k, v: attention(q, k, v, scale=0.3),
    "no dropout by name": lambda q, k, v: attention(q, k, v, dropout_p=0.0),
    "longer keys": lambda q, k, v: attention(q[:, :, :2], k, v),
    "by hand": lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v,
    "by einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhke->bhqe", torch.softmax(torch.einsum("bhqe,bhke->bhqk", q, k) / 2, -1), v
    ),
    "three dimensions": lambda q, k, v: (
        attention(q[:, 0], k[:, 0], v[:, 0]).unsqueeze(1).repeat(1, 2, 1, 1)
    ),
    "fp32 query": lambda q, k, v: attention(q.float(), k, v),
}
MASKS = {
    "boolean": lambda: torch.rand(5, 5) > 0.3,
    "boolean of heads": lambda: torch.rand(3, 2, 5, 5) > 0.3,
    "additive": lambda: torch.randn(5, 5),
    "additive that requires grad": lambda: torch.randn(5, 5, requires_grad=True),
}


@pytest.mark.parametrize("how", HOWS)
def test_the_function(recipe, how):
    inputs = lambda: torch.randn(3, 5, 8, requires_grad=True)  # noqa: E731
    check(lambda: Attend(HOWS[how]), inputs, recipe, k=K)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(recipe, mask):
    def inputs():
        made = MASKS[mask]()
        if made.dtype == torch.bool:
            made = made | torch.eye(
                5, dtype=torch.bool
            )  # a row with nothing to see is NaN in FP32 too
        return torch.randn(3, 5, 8, requires_grad=True), made

    how = lambda q, k, v, m: attention(q, k, v, attn_mask=m)  # noqa: E731
    check(lambda: Attend(how), inputs, recipe, k=K)


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_heads(recipe, groups):
    how = lambda q, k, v: attention(q, k, v, enable_gqa=True)  # noqa: E731
    inputs = lambda: torch.randn(3, 5, 8, requires_grad=True)  # noqa: E731
    check(lambda: Attend(how, heads=4, groups=groups), inputs, recipe, k=K)


def test_dropout_keeps_the_mean(recipe):
    torch.manual_seed(0)
    model = Attend(lambda q, k, v: attention(q, k, v, dropout_p=0.5))
    on(model, recipe)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        mean = torch.stack([model(x) for _ in range(200)]).mean(0)
        model.how = lambda q, k, v: attention(q, k, v)
        expected = model(x)
    # 200 draws of deviation below one: 5 sigma
    assert (mean - expected).abs().max() < 5 / 200**0.5


class Self(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.how = how

    def forward(self, x):
        return self.layer(x, x, x, **self.how)


LAYER_HOWS = {
    "with weights": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padded": {"key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5])},
    "masked": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "need_weights": False},
}


@pytest.mark.parametrize("how", LAYER_HOWS)
def test_the_layer(recipe, how):
    inputs = lambda: torch.randn(2, 5, 8, requires_grad=True)  # noqa: E731
    check(lambda: Self(**LAYER_HOWS[how]), inputs, recipe, k=K)


def test_the_layer_with_other_widths_and_added_keys(recipe):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(
                8, 2, kdim=6, vdim=4, add_bias_kv=True, add_zero_attn=True
            )

        def forward(self, q, k, v):
            return self.layer(q, k, v)

    check(
        Cross,
        lambda: (torch.randn(5, 2, 8), torch.randn(3, 2, 6), torch.randn(3, 2, 4)),
        recipe,
        k=K,
    )


def encoder(norm_first=False):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("mode", ["training", "eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder(recipe, norm_first, mode):
    """torch's fused inference path would read the FP32 masters: it is shut while a region is open."""

    def call(model, x):
        if mode == "training":
            return model(x)
        model.eval()
        if mode == "eval":
            return model(x)
        with getattr(torch, mode)():
            return model(x)

    backward = mode in ("training", "eval")
    check(
        lambda: encoder(norm_first),
        lambda: torch.randn(2, 5, 8),
        recipe,
        k=20,
        call=call,
        backward=backward,
    )
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_encoder_with_padding_in_eval(recipe):
    def call(model, x):
        model.eval()
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with torch.no_grad():
            return model(x, src_key_padding_mask=mask)[:, :3]

    check(encoder, lambda: torch.randn(2, 5, 8), recipe, k=20, call=call, backward=False)


def test_a_whole_transformer(recipe):
    def make():
        return nn.Transformer(8, 2, 1, 1, 16, 0.0, "gelu", batch_first=True)

    def call(model, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        return model(source, target, tgt_mask=mask, tgt_is_causal=True)

    check(make, lambda: (torch.randn(2, 5, 8), torch.randn(2, 4, 8)), recipe, k=24, call=call)
