"""Parameters that meet FP32 tensors in operations which promote nothing, or have no 16-bit kernels."""

import pytest
import torch
from torch import nn

from twins import RECIPES, check

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


def inputs():
    return torch.randn(6, 8, requires_grad=True)


ON_FP32 = {
    "prelu": lambda: nn.PReLU(8),
    "bilinear": lambda: Twice(nn.Bilinear(8, 8, 3)),
    "embedding of a mask token": lambda: MaskToken(),
    "class token": lambda: ClassToken(),
    "spectral filter": lambda: Filter(),
    "solve": lambda: Solve(),
}


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x.flip(0))


class MaskToken(nn.Module):
    """A parameter written into an FP32 input at an index."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

    def forward(self, x):
        x = x.clone()
        x[::2] = self.token
        y = self.head(x).clone()
        y[torch.arange(6) % 3 == 0] = self.token
        return y


class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.randn(7, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(torch.cat([self.token, x]) + self.position)


class Filter(nn.Module):
    """Real parameters viewed as complex ones."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.weight), n=8)


class Solve(nn.Module):
    """Linear algebra that has no 16-bit kernel anywhere."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.eye(8) + torch.randn(8, 8) / 8)

    def forward(self, x):
        a = self.a
        x = torch.linalg.solve(a, x.t()).t()
        return (
            x + torch.linalg.inv(a).diagonal() + torch.linalg.slogdet(a @ a.t())[1] + torch.det(a)
        )


@pytest.mark.parametrize("name", ON_FP32)
def test_parameters_that_meet_fp32_tensors(recipe, name):
    check(ON_FP32[name], inputs, recipe, k=24)


FIRST = torch.tensor([0, 2])
ZEROS = torch.zeros(2, 8, dtype=torch.int64)
WRITES = {
    "index_copy_": lambda b, h: b.index_copy_(0, FIRST, h[:2]),
    "index_add_": lambda b, h: b.index_add_(0, FIRST, h[:2], alpha=0.5),
    "index_put_": lambda b, h: b.index_put_((FIRST,), h[:2], accumulate=True),
    "item": lambda b, h: b.__setitem__(FIRST, h[:2]),
    "scatter_": lambda b, h: b.scatter_(0, ZEROS, h[:2]),
    "scatter_add_": lambda b, h: b.scatter_add_(0, ZEROS, h[:2]),
    "masked_scatter_": lambda b, h: b.masked_scatter_(torch.ones(3, 8, dtype=torch.bool), h),
    "lerp_": lambda b, h: b.lerp_(h[:3], 0.1),
    "lerp_ by a tensor": lambda b, h: b.lerp_(h[:3], torch.full((3, 8), 0.1)),
    "copy_": lambda b, h: b.copy_(h[:3]),
    "add_": lambda b, h: b.add_(h[:3]),
}


class Memory(nn.Module):
    """Activations are written into an FP32 buffer, and into a tensor that has a gradient."""

    def __init__(self, write):
        super().__init__()
        self.body, self.write = nn.Linear(8, 8), write
        self.register_buffer("memory", torch.ones(3, 8))

    def forward(self, x):
        h = self.body(x)
        with torch.no_grad():
            self.write(self.memory, h)
        kept = torch.ones(3, 8)
        self.write(kept, h)
        return h, kept * 2.0


@pytest.mark.parametrize("write", WRITES)
def test_writes_into_fp32_tensors(recipe, write):
    low, exact = check(lambda: Memory(WRITES[write]), inputs, recipe, k=6)
    assert low.model.memory.dtype == torch.float32
    torch.testing.assert_close(low.model.memory, exact.model.memory, rtol=0.02, atol=0.02)
