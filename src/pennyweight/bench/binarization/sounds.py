"""Spoken-like keywords made in code: voiced segments with gliding formants and noisy consonants, as log-mel features.

    features, labels = keywords(1000, seed=0)        float32 [1000, 1, 49, 20], int64 [1000]

Each of ten words is a fixed sequence of formant targets and one consonant, as source and filter of speech synthesis
have it: harmonics of a glottal pitch, weighted by resonances at the formants. Pitch, speed, vocal tract, onset,
loudness and background noise (-12 to 6 dB) are drawn for each sample.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RATE = 8000  # samples a second
LENGTH = 4096  # samples of one recording, half a second
MELS = 20
_WINDOW, _HOP = 256, 80  # of the spectrogram: 32 ms every 10 ms
FRAMES = 1 + (LENGTH - _WINDOW) // _HOP
_HARMONICS = 24
_RESONANCE = 120.0  # bandwidth of a formant in Hz

#: First and second formant in Hz at the start, middle and end of each word, and the consonant: (onset as a share of the
#: word, lowest and highest frequency of its noise in Hz).
WORDS: tuple[tuple[tuple[tuple[int, int], ...], tuple[float, int, int]], ...] = (
    (((300, 2300), (300, 2300), (300, 2300)), (0.0, 2500, 3900)),
    (((750, 1200), (750, 1200), (300, 2200)), (0.0, 500, 1500)),
    (((300, 900), (300, 900), (750, 1200)), (0.0, 2500, 3900)),
    (((750, 1200), (300, 2200), (750, 1200)), (0.5, 500, 1500)),
    (((500, 1800), (500, 1800), (300, 900)), (0.8, 2500, 3900)),
    (((300, 2200), (500, 1500), (300, 900)), (0.0, 500, 1500)),
    (((500, 900), (500, 900), (500, 900)), (0.5, 2500, 3900)),
    (((300, 900), (500, 1500), (300, 2200)), (0.8, 500, 1500)),
    (((600, 1700), (750, 1200), (600, 1700)), (0.0, 1500, 2500)),
    (((600, 1700), (300, 2200), (500, 900)), (0.8, 1500, 2500)),
)


def keywords(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log-mel features float32 [count, 1, frames, MELS] at mean 0 and deviation 1 each, labels int64 [count]."""
    generator = np.random.default_rng([seed, 0])
    labels = generator.permutation(np.arange(count) % len(WORDS))
    waves = np.concatenate([_spoken(part, generator) for part in np.array_split(labels, max(count // 256, 1))])
    features = log_mel(waves)
    features -= features.mean((1, 2), keepdims=True)
    features /= features.std((1, 2), keepdims=True) + 1e-6
    return torch.tensor(features[:, None], dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)


def log_mel(waves: NDArray[np.floating]) -> NDArray[np.float64]:
    """[n, samples] -> [n, frames, MELS]: logarithm of power in bands evenly spaced in mel, 2595 log10(1 + f/700)."""
    frames = np.lib.stride_tricks.sliding_window_view(waves, _WINDOW, axis=1)[:, ::_HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), axis=-1)) ** 2
    edges = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), MELS + 2)
    edges = 700 * (10 ** (edges / 2595) - 1)
    frequency = np.fft.rfftfreq(_WINDOW, 1 / RATE)
    rising = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    bands = np.clip(np.minimum(rising, falling), 0, None)
    return np.log(power @ bands.T + 1e-6)


def _spoken(labels: NDArray[np.integer], generator: np.random.Generator) -> NDArray[np.float64]:
    """Waves [n, LENGTH] of the words."""
    n, time = len(labels), np.arange(LENGTH) / LENGTH
    start, length = generator.uniform(0.0, 0.4, (n, 1)), generator.uniform(0.35, 0.6, (n, 1))
    place = (time - start) / length  # 0 to 1 within the word
    envelope = np.clip(np.minimum(place, 1 - place) * 8, 0, 1)
    tract = generator.normal(1, 0.12, (n, 1))
    formants = np.stack([[_glide(place[i], [f[k] for f in WORDS[w][0]]) for i, w in enumerate(labels)] for k in (0, 1)])
    formants *= tract
    pitch = generator.uniform(90, 240, (n, 1)) * (1 + 0.15 * generator.normal(size=(n, 1)) * (place - 0.5))
    turn: NDArray[np.complex128] = np.exp(2j * np.pi * np.cumsum(pitch, 1) / RATE)
    spin, wave = np.ones_like(turn), np.zeros((n, LENGTH))
    for harmonic in range(1, _HARMONICS + 1):
        frequency = harmonic * pitch
        resonance = sum(1 / (1 + ((frequency - f) / _RESONANCE) ** 2) for f in formants)
        spin *= turn
        wave += resonance * (frequency < RATE / 2) * spin.imag
    wave = envelope * wave + _consonants(labels, place, generator)
    power = np.mean(wave**2, 1, keepdims=True)
    noise = generator.normal(size=wave.shape) * np.sqrt(power * 10 ** (-generator.uniform(-12, 6, (n, 1)) / 10))
    return (wave + noise) * 10 ** generator.uniform(-1, 0, (n, 1))


def _glide(place: NDArray[np.float64], targets: list[int]) -> NDArray[np.float64]:
    return np.interp(place, np.linspace(0.15, 0.85, len(targets)), targets)


def _consonants(
    labels: NDArray[np.integer], place: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """A fifth of the word filled with noise of the word's band."""
    spectrum = np.fft.rfft(generator.normal(size=place.shape))
    frequency = np.fft.rfftfreq(place.shape[1], 1 / RATE)
    onset, low, high = (np.array([WORDS[w][1][k] for w in labels])[:, None] for k in range(3))
    noise = np.fft.irfft(spectrum * ((frequency >= low) & (frequency <= high)), place.shape[1])
    return noise * ((place >= onset) & (place < onset + 0.2))
