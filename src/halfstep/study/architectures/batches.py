"""Made-up batches of each kind that a published architecture takes: seeded, small, learnable by heart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

__all__ = [
    "CLASSES",
    "VOCABULARY",
    "autoencoding",
    "captioned_images",
    "classified_images",
    "continuations",
    "detections",
    "diffusion",
    "images",
    "latent_diffusion",
    "many_classified_images",
    "masked_words",
    "matched_pairs",
    "pairs_of_texts",
    "patched_series",
    "protein",
    "segmentation",
    "series",
    "sound_classes",
    "spectrogram_to_text",
    "spoken",
    "trajectories",
]

Batch = dict[str, Any]

VOCABULARY = 128
CLASSES = 10
_ROWS = 4
_TIME = 24
_IGNORED = -100


def _words(draw: Generator, time: int = _TIME, rows: int = _ROWS) -> Tensor:
    # The first few numbers are the special tokens of most vocabularies.
    return torch.randint(5, VOCABULARY, (rows, time), generator=draw)


def masked_words(draw: Generator) -> Batch:
    """Tokens (rows, time) of which a third are hidden and asked for."""
    words = _words(draw)
    hidden = torch.rand(words.shape, generator=draw) < 1 / 3
    hidden[:, 0] = True  # a row in which nothing is asked would have no loss
    return {
        "input_ids": words.masked_fill(hidden, 4),
        "attention_mask": torch.ones_like(words),
        "labels": words.masked_fill(~hidden, _IGNORED),
    }


def continuations(draw: Generator) -> Batch:
    """Tokens (rows, time), each to be told from those before."""
    words = _words(draw)
    return {"input_ids": words, "labels": words}


def pairs_of_texts(draw: Generator) -> Batch:
    """Two texts a row, the second to be made from the first."""
    return {"input_ids": _words(draw), "labels": _words(draw, 16)}


def images(draw: Generator, size: int = 32, channels: int = 3) -> Batch:
    """Images (rows, channels, size, size) without a label."""
    return {"pixel_values": torch.randn(_ROWS, channels, size, size, generator=draw)}


def classified_images(draw: Generator, size: int = 32) -> Batch:
    """Images and their classes."""
    labels = torch.randint(CLASSES, (_ROWS,), generator=draw)
    return images(draw, size) | {"labels": labels}


def many_classified_images(draw: Generator) -> Batch:
    """As `classified_images`, 16 of 64x64: enough for the statistics of a batch normalisation."""
    labels = torch.randint(CLASSES, (16,), generator=draw)
    return {"pixel_values": torch.randn(16, 3, 64, 64, generator=draw), "labels": labels}


def segmentation(draw: Generator) -> Batch:
    """Images of 64x64 and the class of every pixel."""
    labels = torch.randint(CLASSES, (_ROWS, 64, 64), generator=draw)
    return images(draw, 64) | {"labels": labels}


def detections(draw: Generator) -> Batch:
    """Images of 64x64 with three boxes each, as (centre, size) in shares of the image."""
    found = [
        {
            "class_labels": torch.randint(CLASSES, (3,), generator=draw),
            "boxes": 0.2 + 0.3 * torch.rand(3, 4, generator=draw),
        }
        for _ in range(_ROWS)
    ]
    return images(draw, 64) | {"labels": found}


def matched_pairs(draw: Generator) -> Batch:
    """Images and the texts that belong to them, to be matched."""
    words = _words(draw, 16)
    words[:, -1] = VOCABULARY - 1  # CLIP reads its text off the largest token
    return images(draw) | {"input_ids": words, "return_loss": True}


def captioned_images(draw: Generator) -> Batch:
    """Images and their captions."""
    return images(draw) | {"labels": _words(draw, 16)}


def spoken(draw: Generator) -> Batch:
    """Half a second of sound at 8 kHz a row, and what is said in it."""
    return {
        "input_values": torch.randn(_ROWS, 4000, generator=draw),
        "labels": torch.randint(1, 20, (_ROWS, 6), generator=draw),
    }


def spectrogram_to_text(draw: Generator) -> Batch:
    """Log-mel features (rows, 80, 64) and a text."""
    return {
        "input_features": torch.randn(_ROWS, 80, 64, generator=draw),
        "labels": _words(draw, 16),
    }


def sound_classes(draw: Generator) -> Batch:
    """Spectrograms (rows, 64 frames, 32 bands) and a class each."""
    return {
        "input_values": torch.randn(_ROWS, 64, 32, generator=draw),
        "labels": torch.randint(CLASSES, (_ROWS,), generator=draw),
    }


def series(draw: Generator) -> Batch:
    """Two seasons of a series, the second to be forecast: 31 past values (lags included), 8 to come."""
    return {
        "past_values": 5 + torch.randn(_ROWS, 31, generator=draw),
        "past_time_features": torch.randn(_ROWS, 31, 2, generator=draw),
        "past_observed_mask": torch.ones(_ROWS, 31),
        "future_values": 5 + torch.randn(_ROWS, 8, generator=draw),
        "future_time_features": torch.randn(_ROWS, 8, 2, generator=draw),
    }


def patched_series(draw: Generator) -> Batch:
    """Three channels of 64 past values, 16 to come."""
    return {
        "past_values": torch.randn(_ROWS, 64, 3, generator=draw),
        "future_values": torch.randn(_ROWS, 16, 3, generator=draw),
    }


def protein(draw: Generator) -> Batch:
    """Chains of 30 residues of which a third are hidden."""
    return masked_words(draw)


def trajectories(draw: Generator) -> Batch:
    """States, actions and rewards of 12 moves; the actions are the targets."""
    actions = torch.randn(_ROWS, 12, 3, generator=draw)
    return {
        "states": torch.randn(_ROWS, 12, 6, generator=draw),
        "actions": actions,
        "target": actions,
        "rewards": torch.randn(_ROWS, 12, 1, generator=draw),
        "returns_to_go": torch.randn(_ROWS, 12, 1, generator=draw),
        "timesteps": torch.arange(12).expand(_ROWS, 12),
        "attention_mask": torch.ones(_ROWS, 12),
    }


def diffusion(draw: Generator) -> Batch:
    """Noisy images, how noisy each is, and the noise to be told."""
    return {
        "sample": torch.randn(_ROWS, 3, 16, 16, generator=draw),
        "timestep": torch.randint(1000, (_ROWS,), generator=draw),
        "target": torch.randn(_ROWS, 3, 16, 16, generator=draw),
    }


def latent_diffusion(draw: Generator) -> Batch:
    """As `diffusion`, of four channels, with a text of width 32 that guides."""
    return {
        "sample": torch.randn(_ROWS, 4, 16, 16, generator=draw),
        "timestep": torch.randint(1000, (_ROWS,), generator=draw),
        "encoder_hidden_states": torch.randn(_ROWS, 8, 32, generator=draw),
        "target": torch.randn(_ROWS, 4, 16, 16, generator=draw),
    }


def autoencoding(draw: Generator) -> Batch:
    """Images to be given back."""
    pictures = torch.randn(_ROWS, 3, 32, 32, generator=draw)
    return {"sample": pictures, "target": pictures}
