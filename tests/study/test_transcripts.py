"""Texts, and a split that leaks nothing."""

from __future__ import annotations

import difflib
import random

import pytest

from halfstep.study.transcripts import Part, group_near_identical, normalise, split


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Press 1 to accept this call, or 2 to reject it", None),
        ("Goodbye!", "goodbye"),
        ("... letters of your party's first name.", "letters of your party's first name"),
        ("party\N{RIGHT SINGLE QUOTATION MARK}s", "party's"),
        ("Call-Forward on No Answer.", "call forward on no answer"),
        ("exclaimation-point [!]", "exclaimation point"),
        ("at [@]", "at"),
        ("<beep ascending>", ""),
        ("(10 seconds of silence)", ""),
        ("dial 500 now", ""),
        ("3D audio enabled", ""),
        ("press * to pause", ""),
        ("H.323", ""),
        ("", ""),
    ],
)
def test_normalise(written: str, read: str | None):
    expected = "press one to accept this call or two to reject it" if read is None else read
    assert normalise(written) == expected


def near(one: str, other: str) -> bool:
    """Near-identical, said again with the standard library; it matches no more than the real one."""
    short, long = sorted((one, other), key=len)
    contained = len(short.split()) >= 3 and f" {short} " in f" {long} "
    return contained or difflib.SequenceMatcher(None, one, other, autojunk=False).ratio() > 0.8


def sentences(count: int) -> list[str]:
    draw = random.Random(7)
    words = [
        "press",
        "enter",
        "your",
        "the",
        "call",
        "line",
        "number",
        "one",
        "two",
        "agent",
        "please",
        "again",
        "to",
        "for",
    ]
    return [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(count)]


def test_groups_are_closed_under_near_identical():
    texts = sentences(120)
    group_of = {
        index: number for number, group in enumerate(group_near_identical(texts)) for index in group
    }
    assert sorted(group_of) == list(range(len(texts)))
    for i, one in enumerate(texts):
        for j in range(i):
            if near(one, texts[j]):
                assert group_of[i] == group_of[j], (one, texts[j])


def test_groups_say_what_belongs_together():
    texts = [
        "please enter your password",
        "please enter your new password",
        "goodbye",
        "that is not a valid extension please try again",
        "please try again",
        "goodbye",
    ]
    assert group_near_identical(texts) == [[0, 1], [2, 5], [3, 4]]


def test_split_shares_no_near_identical_sentence():
    texts = sentences(300)
    parts = split(texts, development=20, test=30)
    for i, one in enumerate(texts):
        for j in range(i):
            assert parts[i] is parts[j] or not near(one, texts[j])


def test_split_holds_out_what_was_asked_and_is_the_same_every_time():
    texts = sentences(300)
    parts = split(texts, development=20, test=30)
    assert parts == split(texts, development=20, test=30)
    held = {part: [t for t, p in zip(texts, parts, strict=True) if p is part] for part in Part}
    assert 30 <= len(held[Part.TEST]) < 36
    assert 20 <= len(held[Part.DEVELOPMENT]) < 26
    for part in (Part.TEST, Part.DEVELOPMENT):
        assert all(len(text.split()) >= 2 for text in held[part])
