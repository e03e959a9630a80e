"""What was said: texts brought to the recogniser's alphabet, and split so that no answer leaks.

The prompts of a telephone exchange repeat themselves ("... please try again"). A random split
would put near copies on both sides and measure memory; here whole groups of near-identical
sentences go to one side (:func:`split_groups`).
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

__all__ = [
    "LETTERS",
    "Part",
    "Prompt",
    "group_near_identical",
    "normalise",
    "read_prompts",
    "split",
]

LETTERS = " 'abcdefghijklmnopqrstuvwxyz"
"""What a recognised text is made of; with the blank of CTC, 29 classes."""

_DIGITS = dict(
    zip(
        "0123456789",
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        strict=True,
    )
)
_NOTE = re.compile(r"\[[^\]]*\]|<[^>]*>|\([^)]*\)")
_LONE_DIGIT = re.compile(r"(?<!\w)\d(?!\w)")
_PUNCTUATION = re.compile(r"[-.,:;!?\"/_]")
_ALLOWED = re.compile(f"[{LETTERS}]+")


class Part(Enum):
    """The side of the split a sentence is on."""

    TRAIN = "train"
    DEVELOPMENT = "development"
    TEST = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One recording: its name, its normalised text, its file."""

    name: str
    text: str
    file: Path


def normalise(text: str) -> str:
    """``text`` in :data:`LETTERS`, single digits spelled out; empty if it cannot be said so.

    Bracketed notes go, punctuation becomes a space. What keeps a sign or a longer number is
    ambiguous (28.8 may be spoken in three ways) and gives the empty string.

    >>> normalise("Press 1 to accept this call; dash [-]!")
    'press one to accept this call dash'
    >>> normalise("dial 500"), normalise("[ascending tones]"), normalise("press *")
    ('', '', '')
    """
    plain = _NOTE.sub(" ", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    plain = _LONE_DIGIT.sub(lambda digit: _DIGITS[digit[0]], plain)
    plain = " ".join(_PUNCTUATION.sub(" ", plain).split())
    return plain if _ALLOWED.fullmatch(plain) else ""


def read_prompts(root: Path) -> list[Prompt]:
    """The transcribed recordings below ``root`` (an unpacked copy of the prompts), by name.

    Recordings without speech, without a text, or whose text :func:`normalise` refuses are left out.
    """
    texts = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    sounds = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    prompts = []
    with gzip.open(texts, "rt", encoding="utf-8") as lines:
        for line in lines:
            name, colon, text = line.rstrip("\n").partition(": ")
            file = sounds / f"{name}.wav"
            plain = normalise(text) if colon and not name.startswith(";") else ""
            if plain and file.is_file():
                prompts.append(Prompt(name=name, text=plain, file=file))
    return sorted(prompts, key=lambda prompt: prompt.name)


def group_near_identical(texts: Sequence[str], *, similarity: float = 80.0) -> list[list[int]]:
    """Indices of ``texts`` in groups closed under "near-identical", ordered by first member.

    Two texts are near-identical if more than ``similarity`` percent of their characters can be
    matched in order (RapidFuzz's normalised indel similarity: 2 LCS / (len a + len b)), or if one
    holds the other, of three words or more, as a run of words.
    """
    from rapidfuzz import fuzz, process

    parents = list(range(len(texts)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    scores = process.cdist(texts, texts, scorer=fuzz.ratio)
    for i in range(len(texts)):
        for j in range(i):
            if scores[i, j] > similarity or _holds(texts[i], texts[j]):
                parents[root(i)] = root(j)
    groups: dict[int, list[int]] = {}
    for index in range(len(texts)):
        groups.setdefault(root(index), []).append(index)
    return sorted(groups.values())


def _holds(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return len(short.split()) >= 3 and f" {short} " in f" {long} "


def split(
    texts: Sequence[str],
    *,
    development: int = 32,
    test: int = 48,
    largest: int = 6,
    seed: int = 2017,
) -> list[Part]:
    """The part of each text, whole groups together: at least ``test`` and ``development`` held out.

    Held-out groups have no single-word text (a lone letter says little about reading) and no more
    than ``largest`` members (one family of sentences must not make up the score). The rest trains.
    """
    parts = [Part.TRAIN] * len(texts)
    groups = group_near_identical(texts)
    random.Random(seed).shuffle(groups)
    wanted = {Part.TEST: test, Part.DEVELOPMENT: development}
    for group in groups:
        if len(group) > largest or any(len(texts[index].split()) < 2 for index in group):
            continue
        for part in wanted:
            if wanted[part] > 0:
                wanted[part] -= len(group)
                for index in group:
                    parts[index] = part
                break
    return parts
