"""A corpus: sentences as features and texts, split in three, ready for a recogniser."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfstep.study.datasets import PROMPTS, fetch_debian
from halfstep.study.features import MelSettings, log_mel, trim_silence
from halfstep.study.transcripts import LETTERS, Part, Prompt, read_prompts, split

__all__ = ["Corpus", "Sentence", "load_speech", "normalised"]

_SPEEDS = ((1, 1), (10, 9), (10, 11))  # resampled up, down: as spoken, slower, faster
_LONGEST = 6.0  # seconds; longer prompts are few and would set the cost of every batch
_CACHE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One sentence: ``versions`` of its features, each float32 (frames, bands), and its text.

    Version 0 is as recorded; the others are for training only.
    """

    versions: tuple[Tensor, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Sentences in three parts; ``alphabet`` lists the characters of their texts.

    ``seconds_per_frame`` is 0 where frames are not time.
    """

    title: str
    alphabet: str
    train: tuple[Sentence, ...]
    development: tuple[Sentence, ...]
    test: tuple[Sentence, ...]
    seconds_per_frame: float

    @property
    def bands(self) -> int:
        """Features in a frame."""
        return self.train[0].versions[0].shape[1]

    def describe(self) -> str:
        """One line: how many sentences on each side, how long they are."""
        parts = []
        for name in ("train", "development", "test"):
            sentences: tuple[Sentence, ...] = getattr(self, name)
            frames = sum(len(sentence.versions[0]) for sentence in sentences)
            time = f", {frames * self.seconds_per_frame:.0f} s" if self.seconds_per_frame else ""
            parts.append(f"{name} {len(sentences)} sentences{time}")
        return f"{self.title}: {'; '.join(parts)}"


def load_speech(cache: Path, *, longest: float = _LONGEST) -> Corpus:
    """The transcribed prompts of at most ``longest`` seconds, features normalised on the training
    part.

    Fetches and computes what ``cache`` lacks; a second call reads one file.

    Raises:
        DataError: the recordings cannot be fetched or are not those expected.
    """
    settings = MelSettings()
    key = f"{PROMPTS.sha256} {settings} {_SPEEDS} {longest} {_CACHE_VERSION}"
    file = cache / f"speech-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if not file.exists():
        prompts = read_prompts(fetch_debian(PROMPTS, cache))
        _save(file, prompts, settings, longest)
    stored = torch.load(file, weights_only=True)
    texts: list[str] = stored["texts"]
    versions: list[list[Tensor]] = stored["versions"]
    sides: dict[Part, list[Sentence]] = {part: [] for part in Part}
    for text, features, part in zip(texts, versions, split(texts), strict=True):
        sides[part].append(Sentence(versions=tuple(features), text=text))
    return normalised(
        title="Asterisk telephone prompts",
        alphabet=LETTERS,
        sides=sides,
        seconds_per_frame=settings.hop / settings.rate,
    )


def _save(file: Path, prompts: Sequence[Prompt], settings: MelSettings, longest: float) -> None:
    import soundfile
    from scipy.signal import resample_poly

    texts, versions = [], []
    for prompt in prompts:
        signal, rate = soundfile.read(prompt.file, dtype="float32")
        if rate == settings.rate and len(signal) <= longest * rate:
            spoken = [resample_poly(signal, up, down) for up, down in _SPEEDS]
            versions.append(
                [
                    trim_silence(log_mel(torch.from_numpy(np.ascontiguousarray(one)), settings))
                    for one in spoken
                ]
            )
            texts.append(prompt.text)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    torch.save({"texts": texts, "versions": versions}, partial)
    partial.replace(file)


def normalised(
    *,
    title: str,
    alphabet: str,
    sides: dict[Part, list[Sentence]],
    seconds_per_frame: float = 0.0,
) -> Corpus:
    """A corpus of ``sides``, each band brought to mean 0 and deviation 1 over the training part."""
    heard = torch.cat([sentence.versions[0] for sentence in sides[Part.TRAIN]])
    mean, deviation = heard.mean(0), heard.std(0).clamp(min=1e-3)

    def scaled(part: Part) -> tuple[Sentence, ...]:
        return tuple(
            Sentence(
                versions=tuple((version - mean) / deviation for version in sentence.versions),
                text=sentence.text,
            )
            for sentence in sides[part]
        )

    return Corpus(
        title=title,
        alphabet=alphabet,
        train=scaled(Part.TRAIN),
        development=scaled(Part.DEVELOPMENT),
        test=scaled(Part.TEST),
        seconds_per_frame=seconds_per_frame,
    )
