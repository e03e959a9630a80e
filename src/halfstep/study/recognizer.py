"""Deep Speech 2 in small: convolution, recurrent layers in both directions, CTC.

Amodei et al., "Deep Speech 2" (arXiv 1512.02595), with its sizes divided by about a hundred. An
ordinary PyTorch model: nothing in it knows of a precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Recognizer", "RecognizerShape", "best_path", "encode", "error_rate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecognizerShape:
    """Sizes of a :class:`Recognizer`; ``stride`` is how many input frames make one step."""

    bands: int
    classes: int
    first: int = 64
    first_kernel: int = 5
    channels: int = 160
    kernel: int = 11
    stride: int = 3
    layers: int = 2
    dropout: float = 0.2


class Recognizer(nn.Module):
    """Features float32 (batch, frames, bands), zero past their lengths, to scores (batch, steps,
    classes).

    Scores are logits; class 0 is the blank of CTC. :meth:`steps` says how many of them count.
    """

    def __init__(self, shape: RecognizerShape) -> None:
        super().__init__()
        width = shape.channels
        self.stride = shape.stride
        self.front = nn.Sequential(
            _convolution(shape.bands, shape.first, shape.first_kernel, stride=1),
            nn.BatchNorm1d(shape.first),
            nn.Hardtanh(0.0, 20.0),
            _convolution(shape.first, width, shape.kernel, stride=shape.stride),
            nn.BatchNorm1d(width),
            nn.Hardtanh(0.0, 20.0),
        )
        self.recurrent = nn.ModuleList(
            nn.GRU(width, width, bidirectional=True, batch_first=True) for _ in range(shape.layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(shape.layers))
        self.dropout = nn.Dropout(shape.dropout)
        self.head = nn.Linear(width, shape.classes)

    def steps(self, frames: Tensor) -> Tensor:
        """How many scores a sentence of ``frames`` input frames has (int64, elementwise)."""
        return (frames - 1) // self.stride + 1

    def forward(self, features: Tensor) -> Tensor:
        """Logits (batch, steps, classes)."""
        hidden = self.front(features.transpose(1, 2)).transpose(1, 2)
        for recurrent, norm in zip(self.recurrent, self.norms, strict=True):
            both, _ = recurrent(self.dropout(hidden))
            forwards, backwards = both.chunk(2, dim=2)
            hidden = norm((forwards + backwards).transpose(1, 2)).transpose(1, 2)
        return self.head(self.dropout(hidden))


def _convolution(inputs: int, outputs: int, kernel: int, *, stride: int) -> nn.Conv1d:
    """A convolution over time whose outputs are centred on their inputs."""
    return nn.Conv1d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


def encode(text: str, alphabet: str) -> Tensor:
    """Class of each character of ``text``, int64 (len(text),): its place in
    ``alphabet`` plus one.
    """
    return torch.tensor([alphabet.index(character) + 1 for character in text], dtype=torch.int64)


def best_path(scores: Tensor, alphabet: str) -> str:
    """The text of the best class at every step of ``scores`` (steps, classes): repeats, then
    blanks, dropped.

    Scores that are not a number read as blanks.

    Source: Graves et al. 2006, "Connectionist Temporal Classification", section 3.2.
    """
    classes = torch.unique_consecutive(torch.nan_to_num(scores, nan=0.0).argmax(dim=1))
    return "".join(alphabet[index - 1] for index in classes.tolist() if index > 0)


def error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character error rate in percent: insertions, deletions, substitutions over reference
    characters.

    Pooled over the sentences (long ones weigh more), as is usual; may exceed 100.
    """
    import jiwer

    return 100.0 * float(jiwer.cer(list(references), list(hypotheses)))
