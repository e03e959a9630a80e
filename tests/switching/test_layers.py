"""torch's layers one by one: forward and gradients near FP32's, buffers and statistics in FP32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twins import RECIPES, UNIT, check, run

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


class Op(nn.Module):
    """A function of an input and some parameters, between two layers so that 16-bit tensors come in."""

    def __init__(self, function, *shapes, width=8):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.params = nn.ParameterList([nn.Parameter(torch.randn(s) / 2) for s in shapes])
        self.function = function

    def forward(self, x):
        return self.function(self.first(x), *self.params)


def inputs(*shape, count=1):
    def make():
        return tuple(torch.randn(shape).requires_grad_() for _ in range(count))

    return make


CONVS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    "dilated": (lambda: nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9)),
    "padding same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 6, 6)),
    "padding same dilated": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=3), (2, 4, 8)),
    "padding valid": (lambda: nn.Conv3d(2, 3, 2, padding="valid"), (1, 2, 3, 3, 3)),
    "padding circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        (2, 4, 6, 6),
    ),
    "padding reflect": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        (2, 4, 5, 4),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, groups=1), (1, 2, 3, 3, 3)),
    "channels last": (
        lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        (2, 4, 6, 6),
    ),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(recipe, name):
    make, shape = CONVS[name]
    check(make, inputs(*shape), recipe, k=3)


NORMS = {
    "batch norm 1d": (lambda: nn.BatchNorm1d(8), (16, 8)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (4, 4, 5, 5)),
    "batch norm, not affine": (lambda: nn.BatchNorm2d(4, affine=False), (4, 4, 5, 5)),
    "batch norm, no statistics": (
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        (4, 4, 5, 5),
    ),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 4, 5, 5)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 4, 5, 5)),
    "instance norm with statistics": (
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        (4, 4, 9),
    ),
    "layer norm": (lambda: nn.LayerNorm(8), (4, 8)),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((5, 8), bias=False), (4, 5, 8)),
    "rms norm": (lambda: nn.RMSNorm(8), (4, 8)),
    "local response": (lambda: nn.LocalResponseNorm(2), (4, 4, 5, 5)),
}


@pytest.mark.parametrize("first", [True, False], ids=["on fp32", "on 16 bits"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_and_their_statistics(recipe, name, first):
    norm, shape = NORMS[name]

    def make():
        channels = shape[1]
        if first:
            return nn.Sequential(norm())
        layer = (
            nn.Linear(shape[-1], shape[-1]) if len(shape) == 2 else nn.Conv1d(channels, channels, 1)
        )
        if len(shape) == 4:
            layer = nn.Conv2d(channels, channels, 1)
        return nn.Sequential(layer, norm())

    low, exact = check(make, inputs(*shape), recipe, k=6, rounds=not first)
    for (key, a), (_, b) in zip(
        low.model.named_buffers(), exact.model.named_buffers(), strict=True
    ):
        assert a.dtype == b.dtype, key
        torch.testing.assert_close(a, b, rtol=4 * UNIT[recipe], atol=2 * UNIT[recipe])
    for p in low.model.parameters():
        assert p.dtype == torch.float32
        assert p.grad.dtype == torch.float32


def test_statistics_of_many_steps_stay_with_fp32s(recipe):
    """Running means that were kept in 16 bits would stop moving: 0.1 of a small change is lost."""

    def call(model, x):
        for k in range(20):
            model(x + k / 50)
        return model(x)

    make = lambda: nn.Sequential(nn.BatchNorm1d(8, momentum=0.01))  # noqa: E731
    low, exact = check(make, inputs(32, 8), recipe, k=4, rounds=False, call=call)
    torch.testing.assert_close(
        low.model[0].running_mean, exact.model[0].running_mean, rtol=1e-5, atol=1e-6
    )
    assert low.model[0].num_batches_tracked == 21


class OwnNorm(nn.Module):
    """Batch norm by the functional form: its parameters are no norm layer's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv1d(4, 4, 1)
        self.gamma, self.beta = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, training=True)
        x = F.batch_norm(self.body(x), self.mean, self.var, self.gamma, self.beta, training=True)
        x = F.instance_norm(x, None, None, self.gamma, self.beta)
        x = F.group_norm(x, 2, self.gamma, self.beta)
        x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, training=False)
        return F.layer_norm(x.transpose(1, 2), (4,), self.gamma, self.beta)


def test_norms_by_their_functional_form(recipe):
    low, exact = check(OwnNorm, inputs(4, 4, 9), recipe, k=30)
    assert low.model.mean.dtype == torch.float32
    torch.testing.assert_close(low.model.var, exact.model.var, rtol=0.05, atol=1e-3)


OPS = {
    "einsum": (lambda h, a: torch.einsum("bi,ij->bj", h, a), [(8, 5)]),
    "einsum of three": (lambda h, a, b: torch.einsum("bi,ij,jk->bk", h, a, b), [(8, 5), (5, 3)]),
    "matmul": (lambda h, a: h @ a, [(8, 5)]),
    "batched matmul": (lambda h, a: h.view(2, 3, 8) @ a, [(2, 8, 5)]),
    "broadcast matmul": (lambda h, a: h.view(2, 1, 3, 8) @ a, [(4, 8, 5)]),
    "vector": (lambda h, a: h @ a, [(8,)]),
    "vector on the left": (lambda h, a: a @ h, [(6,)]),
    "dot": (lambda h, a: (h[0] @ a).reshape(1) + torch.dot(h[1], a), [(8,)]),
    "addmm": (lambda h, a, b: torch.addmm(b, h, a, beta=0.5, alpha=2.0), [(8, 5), (5,)]),
    "baddbmm": (lambda h, a, b: torch.baddbmm(b, h.view(2, 3, 8), a), [(2, 8, 5), (2, 3, 5)]),
    "addbmm": (lambda h, a, b: torch.addbmm(b, h.view(2, 3, 8), a), [(2, 8, 5), (3, 5)]),
    "addmv": (lambda h, a, b: torch.addmv(b, h, a), [(8,), (6,)]),
    "addr": (lambda h, a: torch.addr(h, a, h[0]), [(6,)]),
    "outer": (lambda h, a: torch.outer(h[0], a), [(6,)]),
    "bilinear": (lambda h, a, b: F.bilinear(h, h.flip(0), a, b), [(3, 8, 8), (3,)]),
    "kron": (lambda h, a: torch.kron(h, a), [(2, 2)]),
    "chain_matmul": (lambda h, a, b: torch.linalg.multi_dot([h, a, b]), [(8, 5), (5, 3)]),
    "tensordot": (lambda h, a: torch.tensordot(h.view(2, 3, 8), a, dims=1), [(8, 5)]),
    "cdist": (lambda h, a: torch.cdist(h, a), [(5, 8)]),
    "cosine": (lambda h, a: F.cosine_similarity(h, a), [(1, 8)]),
    "pixel shuffle": (lambda h: F.pixel_shuffle(h.view(1, 4, 3, 4), 2), []),
    "pixel unshuffle": (lambda h: F.pixel_unshuffle(h.view(1, 3, 4, 4), 2), []),
    "nearest": (lambda h: F.interpolate(h.view(1, 4, 3, 4), scale_factor=2), []),
    "bilinear interpolation": (
        lambda h: F.interpolate(h.view(1, 4, 3, 4), scale_factor=1.5, mode="bilinear"),
        [],
    ),
    "area": (lambda h: F.interpolate(h.view(1, 4, 12), size=5, mode="area"), []),
    "grid sample": (
        lambda h, g: F.grid_sample(h.view(1, 4, 3, 4), g.tanh(), align_corners=False),
        [(1, 2, 3, 2)],
    ),
    "affine grid": (
        lambda h, t: F.grid_sample(
            h.view(1, 4, 3, 4),
            F.affine_grid(t, [1, 4, 3, 4], align_corners=False),
            align_corners=False,
        ),
        [(1, 2, 3)],
    ),
    "unfold": (lambda h: F.fold(F.unfold(h.view(1, 4, 3, 4), 2), (3, 4), 2), []),
    "avg pool": (lambda h: F.avg_pool2d(h.view(1, 4, 3, 4), 2), []),
    "adaptive pool": (lambda h: F.adaptive_avg_pool2d(h.view(1, 4, 3, 4), 2), []),
    "max pool": (lambda h: F.max_pool1d(h.view(1, 4, 12), 3), []),
    "lp pool": (lambda h: F.lp_pool2d(h.view(1, 4, 3, 4).abs() + 1, 2, 2), []),
    "prelu": (lambda h, a: F.prelu(h, a), [(8,)]),
    "prelu on fp32": (lambda h, a: F.prelu(h.softmax(-1) - 0.1, a), [(1,)]),
    "glu": (lambda h: F.glu(h), []),
    "softmax": (lambda h: F.softmax(h, -1) * 4.0, []),
    "log_softmax": (lambda h: F.log_softmax(h, -1), []),
    "gumbel of given noise": (lambda h, a: F.softmax((h + a) / 0.7, -1), [(8,)]),
    "cumsum": (lambda h: h.cumsum(-1), []),
    "logsumexp": (lambda h: h.logsumexp(-1), []),
    "norm": (lambda h: F.normalize(h, dim=-1), []),
    "var": (lambda h: torch.stack([h.var(-1), h.std(-1), h.mean(-1)]), []),
    "sort": (lambda h: h.sort(-1).values, []),
    "topk": (lambda h: h.topk(3, -1), []),
    "gather": (lambda h: h.gather(1, torch.zeros(6, 2, dtype=torch.int64)), []),
    "scatter_add": (
        lambda h, a: a.scatter_add(0, torch.zeros(6, 8, dtype=torch.int64), h),
        [(6, 8)],
    ),
    "index_add of fp32": (
        lambda h: h.softmax(-1).index_add(0, torch.tensor([0, 1]), h[:2].softmax(-1)),
        [],
    ),
    "cat of mixed": (lambda h, a: torch.cat([h, h.softmax(-1), a]), [(2, 8)]),
    "stack of mixed": (lambda h, a: torch.stack([h, h.softmax(-1), a]), [(6, 8)]),
    "where of mixed": (lambda h, a: torch.where(h > 0, h.softmax(-1), a), [(8,)]),
    "addcmul": (lambda h, a: torch.addcmul(h, h.softmax(-1), a), [(8,)]),
    "lerp": (lambda h, a: torch.lerp(h, h * 2, 0.3) + a, [(8,)]),
    "complex product": (
        lambda h, a: torch.view_as_complex(h.float().view(6, 4, 2)) * a.sum(),
        [(8,)],
    ),
    "fft": (lambda h, a: torch.fft.rfft(h.float() * a), [(8,)]),
    "loss inside": (lambda h, a: F.mse_loss(h, a.expand_as(h)), [(8,)]),
    "cross entropy": (lambda h: F.cross_entropy(h, torch.arange(6)).view(1), []),
    "logits": (
        lambda h, a: F.binary_cross_entropy_with_logits(h, a.sigmoid().expand_as(h)).view(1),
        [(8,)],
    ),
    "smooth l1": (lambda h, a: F.smooth_l1_loss(h, a.expand_as(h)).view(1), [(8,)]),
}


@pytest.mark.parametrize("name", OPS)
def test_functions(recipe, name):
    function, shapes = OPS[name]
    check(lambda: Op(function, *shapes), inputs(6, 8), recipe, k=12)


def test_dropout_draws_as_in_fp32(recipe):
    def make():
        return nn.Sequential(
            nn.Linear(8, 8), nn.Dropout(0.5), nn.AlphaDropout(0.3), nn.Linear(8, 8)
        )

    def call(model, x):
        torch.manual_seed(3)
        return model[1](torch.ones(64, 64)).eq(0).float() + model(x).sum() * 0.0

    low, exact = (
        run(make, inputs(6, 8), recipe, call=call),
        run(make, inputs(6, 8), "fp32", call=call),
    )
    assert torch.equal(low.outputs[0] == 0, exact.outputs[0] == 0)
