"""What pwd.py trains on. Each task is what differs from recipes/pwd.yaml, and how its quality is measured.

images         Fashion-MNIST at 14 x 14 pixels by an MLP, as in lawn.py
photographs    CIFAR-10 at 16 x 16 pixels by ResNet-20
characters     Tiny Shakespeare by the causal transformer of denoise_affine.py; bits per character
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .denoise_affine import CONTEXT, DEPTH, FEATURES, CharacterModel, load_text
from .lawn import TEST as SMALL_TEST
from .lawn import TRAIN as SMALL_IMAGES
from .recipe_runs import cifar10_halved

#: Windows of the text.
TRAIN, VALIDATION, TEST = 32_768, 1_024, 2_048
PHOTOGRAPHS, HELD_OUT = 19_968, 2_000


class Task(NamedTuple):
    """changes: of the recipe. samples: to train on, without those for validation. rates: learning rates tried.
    exponents: the p. quality: what is measured; near: how much of it counts as little. data: for the page,
    which adds the number of weights."""

    changes: dict[str, Any]
    samples: int
    rates: Sequence[float]
    exponents: Sequence[float]
    quality: str
    near: float
    data: str


TASKS: dict[str, Task] = {
    "images": Task(
        {},
        SMALL_IMAGES,
        (3e-3, 1e-2, 3e-2, 1e-1),
        (0.4, 0.6, 0.8, 1.0, 1.5, 2.0),
        "test accuracy in percent",
        1.0,
        f"Images: Fashion-MNIST at 14 x 14, {SMALL_IMAGES:,} to train on, {SMALL_TEST:,} test images; MLP",
    ),
    "photographs": Task(
        {
            "model": {"name": "resnet20"},
            "data.name": f"{cifar10_halved.__module__}:cifar10_halved",
            "data.options": {"samples": PHOTOGRAPHS + HELD_OUT},
            "data.validation": HELD_OUT,
            "data.flip": True,
            "batch": 64,
            "epochs": 2.0,
        },
        PHOTOGRAPHS,
        (3e-3, 1e-2, 3e-2),
        (0.4, 0.8, 1.0, 2.0),
        "test accuracy in percent",
        1.0,
        f"Photographs: CIFAR-10 at 16 x 16, {PHOTOGRAPHS:,} to train on, mirrored at random, all test images; "
        "ResNet-20, 2 epochs",
    ),
    "characters": Task(
        {
            "model.name": f"{__name__}:character_transformer",
            "data.name": f"{__name__}:characters",
            "data.validation": VALIDATION,
            "batch": 32,
            "epochs": 1.0,
        },
        TRAIN,
        (1e-3, 3e-3, 1e-2),
        (0.4, 0.6, 0.8, 1.0, 1.5, 2.0),
        "bits per character of the test text",
        0.05,
        f"Characters: Tiny Shakespeare, {TRAIN:,} windows of {CONTEXT} characters of its first 80 %, {TEST:,} of its "
        f"last 10 % to test; causal transformer of {DEPTH} blocks and {FEATURES} features",
    ),
}


def character_transformer() -> CharacterModel:
    return CharacterModel(load_text().vocabulary)


@cache
def characters() -> dict[str, tuple[Tensor, Tensor]]:
    """Windows spread evenly over Tiny Shakespeare: the characters, and those that follow, both [windows, CONTEXT]."""
    text = load_text()
    return {"train": _windows(text.train, TRAIN + VALIDATION), "test": _windows(text.test, TEST)}


def _windows(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    starts = torch.linspace(0, len(ids) - CONTEXT - 1, count).long()
    rows = ids[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]
