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
