"""The programs whose training step is timed: model, batch and loss, seeded and self-contained."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WORKLOADS", "Workload", "cnn", "lstm", "small_layers", "three_layers", "transformer"]

VOCABULARY = 1000
CLASSES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model with one batch, and what a reader must know to judge its figures."""

    name: str
    description: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def to(self, device: str) -> Workload:
        """A copy of its own on the device."""
        return dataclasses.replace(
            self,
            model=copy.deepcopy(self.model).to(device),
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
        )

    def with_model(self, model: nn.Module) -> Workload:
        """The same batch and loss, for another model."""
        return dataclasses.replace(self, model=model)

    def loss(self, outputs: Tensor) -> Tensor:
        """Cross-entropy of scores (..., classes) against the targets (...)."""
        return F.cross_entropy(outputs.flatten(0, -2), self.targets.flatten())


class Transformer(nn.Module):
    """A decoder-sized stack of pre-norm encoder layers between an embedding and a linear head."""

    def __init__(self, *, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            dim_feedforward=4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (batch, time, vocabulary) of tokens (batch, time)."""
        return self.head(self.layers(self.embedding(tokens)))


class Residual(nn.Module):
    """The basic block of He et al., arXiv 1512.03385: two 3x3 convolutions and a short cut."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps (batch, outputs, height / stride, width / stride)."""
        return F.relu(self.body(images) + self.shortcut(images))


class Recurrent(nn.Module):
    """An embedding, an LSTM over the whole sequence, a linear head."""

    def __init__(self, *, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (batch, time, vocabulary) of tokens (batch, time)."""
        return self.head(self.lstm(self.embedding(tokens))[0])


def transformer() -> Workload:
    """Six layers of width 512, 16 sequences of 128 tokens: 20 million parameters."""
    torch.manual_seed(0)
    return Workload(
        name="transformer",
        description="6 layers, d=512, 8 heads, T=128, B=16, vocabulary 1000",
        model=Transformer(layers=6, width=512, heads=8),
        inputs=torch.randint(VOCABULARY, (16, 128)),
        targets=torch.randint(VOCABULARY, (16, 128)),
    )


def cnn() -> Workload:
    """ResNet-18 with a 3x3 stem on 16 images of 32x32: 11 million parameters."""
    torch.manual_seed(0)
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    widths += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks = [Residual(inputs, outputs, stride=stride) for inputs, outputs, stride in widths]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]
    return Workload(
        name="CNN",
        description="ResNet-18-like, 8 residual blocks of width 64-512, 32x32, B=16",
        model=nn.Sequential(*stem, *blocks, *head),
        inputs=torch.randn(16, 3, 32, 32),
        targets=torch.randint(CLASSES, (16,)),
    )


def lstm() -> Workload:
    """A 2-layer LSTM of width 512 over 32 sequences of 64 tokens: 5 million parameters."""
    torch.manual_seed(0)
    return Workload(
        name="LSTM",
        description="2 layers of 512, T=64, B=32, vocabulary 1000",
        model=Recurrent(layers=2, width=512),
        inputs=torch.randint(VOCABULARY, (32, 64)),
        targets=torch.randint(VOCABULARY, (32, 64)),
    )


def small_layers() -> Workload:
    """150 linear layers of 16x16, 300 parameters: what the switch costs beside the arithmetic."""
    torch.manual_seed(0)
    layers = [module for _ in range(149) for module in (nn.Linear(16, 16), nn.ReLU())]
    return Workload(
        name="300 small parameters",
        description="150 linear layers of 16x16, B=32",
        model=nn.Sequential(*layers, nn.Linear(16, CLASSES)),
        inputs=torch.randn(32, 16),
        targets=torch.randint(CLASSES, (32,)),
    )


def three_layers() -> Workload:
    """Three linear layers whose step takes about a millisecond: what a step costs beside a short one."""
    torch.manual_seed(0)
    return Workload(
        name="three layers",
        description="linear layers 128-128-128-10, B=32",
        model=nn.Sequential(
            nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES)
        ),
        inputs=torch.randn(32, 128),
        targets=torch.randint(CLASSES, (32,)),
    )


WORKLOADS: tuple[Callable[[], Workload], ...] = (transformer, cnn, lstm)
