"""Spectra of signals whose spectra are known."""

from __future__ import annotations

import math

import torch

from halfstep.study.features import MelSettings, log_mel, mel_filters, trim_silence

SETTINGS = MelSettings()


def tone(hertz: float, seconds: float = 0.5) -> torch.Tensor:
    times = torch.arange(int(seconds * SETTINGS.rate)) / SETTINGS.rate
    return torch.sin(2 * math.pi * hertz * times)


def test_filters_are_triangles_that_add_to_one_between_the_outer_centres():
    filters = mel_filters(SETTINGS)
    assert filters.shape == (129, 40)
    assert bool((filters >= 0).all())
    assert float(filters.max()) <= 1
    between = filters.sum(1)[5:118]  # 156 Hz to 3.7 kHz
    torch.testing.assert_close(between, torch.ones_like(between))


def test_a_tone_is_loudest_in_its_own_band():
    filters = mel_filters(SETTINGS)
    for hertz in (300.0, 1000.0, 3000.0):
        loudest = int(log_mel(tone(hertz), SETTINGS).mean(0).argmax())
        nearest = int(filters[round(hertz / SETTINGS.rate * SETTINGS.transform)].argmax())
        assert abs(loudest - nearest) <= 1


def test_one_frame_a_hop_and_silence_is_the_floor():
    quiet = log_mel(torch.zeros(8000), SETTINGS)
    assert quiet.shape == (101, 40)
    torch.testing.assert_close(quiet, torch.full_like(quiet, math.log(SETTINGS.floor)))


def test_twice_as_loud_is_the_square_of_two_in_power():
    soft, loud = (log_mel(gain * tone(1000.0), SETTINGS).max() for gain in (0.25, 0.5))
    assert (
        float(loud - soft) == torch.tensor(math.log(4.0)).item()
        or abs(float(loud - soft) - math.log(4.0)) < 1e-3
    )


def test_silent_ends_go_and_the_middle_stays():
    signal = torch.cat([torch.zeros(8000), tone(500.0), torch.zeros(4000)])
    features = log_mel(signal, SETTINGS)
    kept = trim_silence(features, margin=6)
    assert 50 <= len(kept) <= 50 + 2 * 6 + 4
    assert trim_silence(kept[10:40]).shape == (30, 40)
