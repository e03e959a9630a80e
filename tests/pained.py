"""Models in which low precision hurts: what halfstep does with them, and what torch does."""

import torch
from torch import nn


class Fused(nn.Module):
    """Three point-wise operations that a compiler makes one of; each rounds, so that much is lost."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return (self.layer(x) * 1.1 + 300.0) - 300.0


class Branched(nn.Module):
    """A side branch whose gradients no loss scale lifts into fp16: Adam learns it well in FP32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.main, self.side = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.main(x) + self.side(x) * 2.0**-42
