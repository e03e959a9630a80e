"""What is heard: log-mel spectra of telephone speech, in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MelSettings", "log_mel", "mel_filters", "trim_silence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MelSettings:
    """How a spectrum is taken; times in samples at ``rate`` Hz."""

    rate: int = 8000
    window: int = 200  # 25 ms
    hop: int = 80  # 10 ms
    transform: int = 256
    bands: int = 40
    lowest: float = 60.0
    floor: float = 1e-6  # the recordings' own noise is about 1e-5


def mel_filters(settings: MelSettings) -> Tensor:
    """Triangular filters, float32 (transform // 2 + 1, bands): column b weighs band b's
    frequencies.

    Corners are equally spaced in mel = 2595 log10(1 + Hz / 700) (O'Shaughnessy 1987), from
    ``lowest`` to half the rate.
    """
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (settings.lowest, settings.rate / 2))
    mels = torch.linspace(low, high, settings.bands + 2, dtype=torch.float64)
    corners = 700 * (10 ** (mels / 2595) - 1)
    bins = torch.linspace(0, settings.rate / 2, settings.transform // 2 + 1, dtype=torch.float64)
    rising = (bins[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins[:, None]) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(signal: Tensor, settings: MelSettings) -> Tensor:
    """Natural log of the mel power spectrum, float32 (frames, bands), of ``signal`` (samples,) in
    [-1, 1].

    One frame per ``hop``, centred; ``floor`` is added before the logarithm, so silence is finite.
    """
    spectrum = torch.stft(
        signal.float(),
        n_fft=settings.transform,
        hop_length=settings.hop,
        win_length=settings.window,
        window=torch.hann_window(settings.window),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum.abs().square().T
    return (power @ mel_filters(settings) + settings.floor).log()


def trim_silence(features: Tensor, *, below: float = 5.0, margin: int = 6) -> Tensor:
    """``features`` (frames, bands) without silent ends, ``margin`` frames kept at each.

    A frame is silent if its mean over bands is more than ``below`` (nats) under the loudest's.
    All of it is returned if nothing is silent.
    """
    level = features.mean(dim=1)
    loud = torch.nonzero(level > level.max() - below).flatten()
    first, last = int(loud[0]), int(loud[-1])
    return features[max(0, first - margin) : last + 1 + margin]
