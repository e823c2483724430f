"""The fifteen corruptions of Benchmarking Neural Network Robustness to Common Corruptions, arXiv 1903.12261.

    corrupted = corrupt(images, "fog", severity=3, seed=0)          uint8 [n, height, width, channels] -> the same

Types and severities (1 to 5) are those of CIFAR-10-C, made here from NumPy and SciPy alone. Departures: frost is drawn
(crystals grown from random lines) where the original pastes photographs; JPEG's loss is its colour conversion, halved
chroma and quantised cosine transform, without the lossless coding after it; parameters that make a higher severity the
milder one in CIFAR-10-C (elastic, glass, snow) are put in order, so that severity always means distance. All randomness
of one type is drawn alike at every severity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from ...errors import DataError, UnknownNameError

SEVERITIES = (1, 2, 3, 4, 5)

Images = NDArray[np.float64]  # [n, height, width, channels] in 0..1


def corrupt(images: NDArray[np.uint8], kind: str, severity: int, seed: int = 0) -> NDArray[np.uint8]:
    """Corrupted copies of images.

    images: uint8 [n, height, width, channels], channels 1 or 3. kind: one of `CORRUPTIONS`. severity: 1 to 5.
    Raises UnknownNameError on another kind, DataError on other images or severities.
    """
    if kind not in _TYPES:
        raise UnknownNameError("corruption", kind, _TYPES)
    if severity not in SEVERITIES:
        raise DataError(f"severity {severity} of {kind} does not exist; give 1 to 5")
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise DataError(f"images to corrupt are {images.dtype} {images.shape}; give uint8 [n, height, width, 1 or 3]")
    generator = np.random.default_rng([seed, CORRUPTIONS.index(kind)])
    changed = _TYPES[kind](images / 255.0, severity - 1, generator)
    return (np.clip(changed, 0, 1) * 255 + 0.5).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------------- noise


def _gaussian_noise(x: Images, at: int, generator: np.random.Generator) -> Images:
    return x + generator.normal(size=x.shape) * (0.04, 0.06, 0.08, 0.09, 0.10)[at]


def _shot_noise(x: Images, at: int, generator: np.random.Generator) -> Images:
    photons = (500, 250, 100, 75, 50)[at]
    return generator.poisson(x * photons) / photons


def _impulse_noise(x: Images, at: int, generator: np.random.Generator) -> Images:
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[at]
    drawn, salt = generator.random(x.shape), generator.random(x.shape) < 0.5
    return np.where(drawn < share, salt.astype(float), x)


# --------------------------------------------------------------------------------------------------------------- blur


def _defocus_blur(x: Images, at: int, generator: np.random.Generator) -> Images:
    radius, smooth = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[at]
    y, z = np.mgrid[-3:4, -3:4]
    disc = ndimage.gaussian_filter((y**2 + z**2 <= radius**2).astype(float), smooth)
    return ndimage.convolve(x, (disc / disc.sum())[None, :, :, None], mode="reflect")


def _glass_blur(x: Images, at: int, generator: np.random.Generator) -> Images:
    """A share of the pixels trade places with neighbours, between two blurs."""
    sigma, share, rounds = ((0.05, 0.25, 1), (0.25, 0.5, 1), (0.3, 1.0, 1), (0.35, 1.0, 2), (0.4, 1.0, 3))[at]
    n, height, width, _ = x.shape
    x = ndimage.gaussian_filter(x, (0, sigma, sigma, 0))
    every = np.arange(n)
    for _ in range(rounds):
        moves = generator.integers(-1, 2, size=(2, height, width, n)) * (generator.random((height, width, n)) < share)
        for i in range(height - 2, 0, -1):
            for j in range(width - 2, 0, -1):
                u, v = i + moves[0, i, j], j + moves[1, i, j]
                here = x[:, i, j].copy()
                x[:, i, j] = x[every, u, v]
                x[every, u, v] = here
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0))


def _motion_blur(x: Images, at: int, generator: np.random.Generator) -> Images:
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.5), (9, 3.0))[at]
    return _smear(x, radius, sigma, generator.uniform(-np.pi / 4, np.pi / 4))


def _smear(x: Images, radius: int, sigma: float, angle: float) -> Images:
    """Averages along one direction with one-sided Gaussian weights, between pixels by interpolation."""
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma) ** 2)
    out = np.zeros_like(x)
    for step, weight in enumerate(weights / weights.sum()):
        if weight > 1e-6:
            out += weight * ndimage.shift(
                x, (0, step * np.sin(angle), step * np.cos(angle), 0), order=1, mode="nearest"
            )
    return out


def _zoom_blur(x: Images, at: int, generator: np.random.Generator) -> Images:
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[at], 0.01)
    enlarged = (_enlarging(x.shape[1], f) @ np.moveaxis(x, -1, 1) @ _enlarging(x.shape[2], f).T for f in factors)
    return (x + np.moveaxis(sum(enlarged, np.zeros(1)), 1, -1)) / (len(factors) + 1)


def _enlarging(size: int, factor: float) -> NDArray[np.float64]:
    """The matrix that interpolates the centre of a line of pixels to the length of the whole."""
    at = (np.arange(size) - (size - 1) / 2) / factor + (size - 1) / 2
    return np.clip(1 - np.abs(at[:, None] - np.arange(size)), 0, None)


# ------------------------------------------------------------------------------------------------------------ weather


def _snow(x: Images, at: int, generator: np.random.Generator) -> Images:
    level, sigma, veil = ((0.05, 1.0, 0.95), (0.07, 1.25, 0.9), (0.09, 1.5, 0.87), (0.12, 1.75, 0.83), (0.15, 2, 0.8))[
        at
    ]
    flakes = generator.normal(level, 0.3, size=(*x.shape[:3], 1))
    flakes = _smear(np.where(flakes < 0.6, 0, np.clip(flakes, 0, 1)), 6, sigma, generator.uniform(-2.4, -0.8))
    grey = x.mean(-1, keepdims=True)
    whitened = veil * x + (1 - veil) * np.maximum(x, grey * 1.5 + 0.5)
    return whitened + flakes + np.flip(flakes, (1, 2))


def _frost(x: Images, at: int, generator: np.random.Generator) -> Images:
    kept, frozen = ((1.0, 0.2), (1.0, 0.3), (0.95, 0.4), (0.9, 0.5), (0.85, 0.6))[at]
    return kept * x + frozen * _crystals(x.shape, generator)


def _crystals(shape: tuple[int, ...], generator: np.random.Generator) -> Images:
    """Bright ridges: distances to random lines through the image, densest at its rim."""
    n, height, width, _ = shape
    y, z = np.mgrid[0:height, 0:width] / max(height, width) - 0.5
    out = np.zeros((n, height, width))
    for _ in range(12):
        angle, offset = generator.uniform(0, np.pi, (n, 1, 1)), generator.uniform(-0.6, 0.6, (n, 1, 1))
        distance = np.abs(y * np.sin(angle) + z * np.cos(angle) - offset)
        out = np.maximum(out, np.exp(-distance * generator.uniform(10, 40, (n, 1, 1))))
    rim = 0.6 + 0.8 * np.maximum(np.abs(y), np.abs(z))
    grain = ndimage.gaussian_filter(generator.normal(size=out.shape), (0, 0.7, 0.7))
    return np.clip(out * rim + 0.15 * grain, 0, 1)[..., None]


def _fog(x: Images, at: int, generator: np.random.Generator) -> Images:
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[at]
    brightest = x.max((1, 2, 3), keepdims=True)
    fog = _plasma(x.shape, decay, generator)[..., None]
    return (x + amount * fog) * brightest / (brightest + amount)


def _plasma(shape: tuple[int, ...], decay: float, generator: np.random.Generator) -> Images:
    """Clouds in 0..1: octaves of smooth noise, each finer one `decay` times weaker."""
    n, height, width, _ = shape
    size = 1 << (max(height, width) - 1).bit_length()
    out: Images = np.zeros((n, size, size))
    cells, weight = 2, 1.0
    while cells <= size:
        coarse = generator.uniform(-1, 1, (n, cells, cells))
        octave: Any = ndimage.zoom(coarse, (1, size / cells, size / cells), order=1, mode="nearest", grid_mode=True)
        out += weight * octave
        cells, weight = 2 * cells, weight / decay
    out = out[:, :height, :width]
    out -= out.min((1, 2), keepdims=True)
    return out / np.maximum(out.max((1, 2), keepdims=True), 1e-12)


def _brightness(x: Images, at: int, generator: np.random.Generator) -> Images:
    """Adds to the value of hue, saturation, value: colours keep their ratio to the brightest of the three."""
    value = x.max(-1, keepdims=True)
    brighter = np.clip(value + (0.05, 0.1, 0.15, 0.2, 0.3)[at], 0, 1)
    return np.where(value > 0, x / np.maximum(value, 1e-12), 1.0) * brighter


def _contrast(x: Images, at: int, generator: np.random.Generator) -> Images:
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[at] + mean


# ------------------------------------------------------------------------------------------------------------ digital


def _elastic_transform(x: Images, at: int, generator: np.random.Generator) -> Images:
    """Every pixel from a place that smooth noise displaces; displacement in shares of the image's side."""
    reach = (0.02, 0.03, 0.04, 0.055, 0.07)[at] * min(x.shape[1:3])
    sigma = 0.06 * min(x.shape[1:3])
    moves = ndimage.gaussian_filter(generator.uniform(-1, 1, (2, *x.shape[:3])), (0, 0, sigma, sigma))
    moves *= reach / np.maximum(moves.std((2, 3), keepdims=True), 1e-12)
    rows, cols = np.mgrid[0 : x.shape[1], 0 : x.shape[2]]
    return _sampled(x, rows + moves[0], cols + moves[1])


def _pixelate(x: Images, at: int, generator: np.random.Generator) -> Images:
    """Averaged over the boxes of a coarser grid, and enlarged by repetition."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[at]
    for axis in (1, 2):
        size = x.shape[axis]
        coarse = max(round(size * share), 1)
        edges = np.linspace(0, size, coarse + 1)
        pixel = np.arange(size)
        overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        averaging = np.clip(overlap, 0, None) * coarse / size
        nearest = ((pixel + 0.5) * coarse / size).astype(int)
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ averaging.T[:, nearest], -1, axis)
    return x


#: Annex K of the JPEG standard, ITU-T T.81.
_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)  # fmt: skip
_CHROMINANCE = np.full((8, 8), 99)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
#: ITU-T T.871: luminance and the two differences of colour, from red, green and blue.
_COLOURS = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def _jpeg_compression(x: Images, at: int, generator: np.random.Generator) -> Images:
    quality = (80, 65, 58, 50, 40)[at]
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = [np.clip(np.floor((t * percent + 50) / 100), 1, 255) for t in (_LUMINANCE, _CHROMINANCE)]
    if x.shape[-1] == 1:
        return _through_cosines(x[..., 0] * 255 - 128, tables[0])[..., None] / 255 + 128 / 255
    planes = np.moveaxis(x * 255 @ _COLOURS.T, -1, 0)
    restored = [_through_cosines(planes[0] - 128, tables[0]) + 128]
    height, width = x.shape[1:3]
    for plane in planes[1:]:
        padded = np.pad(plane, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
        halved = padded.reshape(len(x), -(-height // 2), 2, -(-width // 2), 2).mean((2, 4))
        halved = _through_cosines(halved, tables[1])
        restored.append(halved.repeat(2, 1).repeat(2, 2)[:, :height, :width])
    return np.moveaxis(np.stack(restored), 0, -1) @ np.linalg.inv(_COLOURS).T / 255


def _through_cosines(plane: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, height, width] with the cosine transform of each block of 8 x 8 rounded to multiples of the table."""
    n, height, width = plane.shape
    padded = np.pad(plane, ((0, 0), (0, -height % 8), (0, -width % 8)), mode="edge")
    blocks = padded.reshape(n, padded.shape[1] // 8, 8, padded.shape[2] // 8, 8).transpose(0, 1, 3, 2, 4)
    spectrum: Any = fft.dctn(blocks, axes=(-2, -1), norm="ortho")
    codes = np.round(spectrum / table)
    back: Any = fft.idctn(codes * table, axes=(-2, -1), norm="ortho")
    return back.transpose(0, 1, 3, 2, 4).reshape(padded.shape)[:, :height, :width]


def _sampled(x: Images, rows: NDArray[np.float64], cols: NDArray[np.float64]) -> Images:
    """Values between pixels, bilinearly; places beyond the border are reflected. rows, cols: [(n,) height, width]."""
    n, height, width, channels = x.shape
    where = np.stack(np.broadcast_arrays(np.broadcast_to(rows, (n, height, width)), cols))
    out = np.empty_like(x)
    for i in range(n):
        for c in range(channels):
            out[i, ..., c] = ndimage.map_coordinates(x[i, ..., c], where[:, i], order=1, mode="reflect")
    return out


_TYPES: dict[str, Callable[[Images, int, np.random.Generator], Images]] = {
    "gaussian noise": _gaussian_noise,
    "shot noise": _shot_noise,
    "impulse noise": _impulse_noise,
    "defocus blur": _defocus_blur,
    "glass blur": _glass_blur,
    "motion blur": _motion_blur,
    "zoom blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg": _jpeg_compression,
}
CORRUPTIONS = tuple(_TYPES)
