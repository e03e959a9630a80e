"""Strings of real handwritten digits: what the recogniser reads where speech cannot be fetched."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from halfstep.study.corpus import Corpus, Sentence, normalised
from halfstep.study.datasets import mnist_5k
from halfstep.study.transcripts import Part

__all__ = ["load_handwriting"]

_SENTENCES = {Part.TRAIN: 600, Part.DEVELOPMENT: 60, Part.TEST: 100}
_SHARES = {Part.TRAIN: 0.8, Part.DEVELOPMENT: 0.08, Part.TEST: 0.12}


def load_handwriting(*, seed: int = 2017) -> Corpus:
    """Lines of 3 to 10 MNIST digits written side by side, some touching: a column of pixels is a
    frame.

    No digit image is on two sides of the split.
    """
    images, labels = mnist_5k()
    choose = random.Random(seed)
    order = list(range(len(labels)))
    choose.shuffle(order)
    sides: dict[Part, list[Sentence]] = {}
    for part in Part:
        count = round(_SHARES[part] * len(labels))
        pool, order = order[:count], order[count:]
        sides[part] = []
        for _ in range(_SENTENCES[part]):
            chosen = [choose.choice(pool) for _ in range(choose.randint(3, 10))]
            text = "".join(str(labels[i]) for i in chosen)
            version = _line([images[i] for i in chosen], choose)
            sides[part].append(Sentence(versions=(version,), text=text))
    return normalised(title="Lines of MNIST digits", alphabet="0123456789", sides=sides)


def _line(images: list[np.ndarray], choose: random.Random) -> Tensor:
    """The images side by side, each cut to its ink, -2 to 6 columns apart: float32
    (columns, 28).
    """
    columns = np.zeros((4, 28), dtype=np.float32)
    for image in images:
        ink = np.flatnonzero(image.max(axis=0) > 0)
        digit = image[:, ink[0] : ink[-1] + 1].T
        gap = choose.randint(-2, 6)
        if gap < 0:
            columns[gap:] = np.maximum(columns[gap:], digit[:-gap])
            columns = np.concatenate([columns, digit[-gap:]])
        else:
            blank = np.zeros((gap, 28), dtype=np.float32)
            columns = np.concatenate([columns, blank, digit])
    return torch.from_numpy(np.concatenate([columns, np.zeros((4, 28), dtype=np.float32)]))
