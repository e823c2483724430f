"""The networks of the benchmark: reference models, and which layers stay real-valued besides first and last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnknownNameError
from .data import POINTS, TOKENS, VOCABULARY
from .sounds import FRAMES, MELS


@dataclass(frozen=True)
class Architecture:
    """family: CNN, Transformer or MLP. factory: of `pennyweight.models`. small, published: its options in trainings and
    in deployments. takes: what inputs are, images, sounds, points or tokens. real: patterns of layers that stay real,
    as the 1x1 convolutions of shortcuts do in BiBench.

    The sign of a ReLU is +1 everywhere, so that real twins and binarised networks have Hardtanh in its place, as there.
    """

    family: str
    factory: str
    takes: str
    small: dict[str, Any]
    published: dict[str, Any]
    real: tuple[str, ...] = ()

    def options(self, inputs: tuple[int, ...], classes: int, published: bool = False) -> dict[str, Any]:
        """Arguments of the factory. inputs: shape of one sample."""
        found = {"num_classes": classes, **(self.published if published else self.small)}
        if self.takes == "images":
            found["in_channels"] = inputs[0]
        if self.factory in ("vgg_small", "vit_tiny"):
            found["image_size"] = inputs[1]
        return found

    def rules(self, method: dict[str, Any]) -> dict[str, Any]:
        """The `prepare` section of that method for this network."""
        own = [{"match": list(self.real), "exclude": True}] if self.real else []
        return {**method, "rules": [*own, *method.get("rules", [])]}


_HARDTANH = {"activation": "hardtanh"}
_TEXT = {"vocabulary": VOCABULARY, "positions": TOKENS}
_POINTS = {"transforms": False, **_HARDTANH}

ARCHITECTURES = {
    "resnet20": Architecture("CNN", "resnet20", "images", {"width": 8, **_HARDTANH}, _HARDTANH),
    "resnet18": Architecture(
        "CNN", "resnet18_cifar", "images", {"width": 8, **_HARDTANH}, _HARDTANH, real=("*.shortcut.0",)
    ),
    "vgg-small": Architecture("CNN", "vgg_small", "images", {"width": 16}, {}),
    "vit-tiny": Architecture("Transformer", "vit_tiny", "images", {}, {}),
    "bert-tiny": Architecture("Transformer", "bert_tiny", "tokens", _TEXT, _TEXT),
    "keyword-conv": Architecture("CNN", "keyword_conv", "sounds", {"width": 32, **_HARDTANH}, _HARDTANH),
    "pointnet": Architecture("MLP", "pointnet", "points", _POINTS, _POINTS),
}

_SHAPES = {"images": (3, 32, 32), "sounds": (1, FRAMES, MELS), "points": (3, POINTS), "tokens": (TOKENS,)}
_CLASSES = {"images": 10, "sounds": 12, "points": 40, "tokens": 2}


def architecture(name: str) -> Architecture:
    """Raises UnknownNameError with the close matches."""
    if name not in ARCHITECTURES:
        raise UnknownNameError("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def published(name: str, batch: int) -> tuple[dict[str, Any], Tensor]:
    """(arguments of the factory, random inputs) of an architecture at its published width."""
    it = architecture(name)
    shape, generator = _SHAPES[it.takes], torch.Generator().manual_seed(0)
    if it.takes == "tokens":
        inputs = torch.randint(1, VOCABULARY, (batch, *shape), generator=generator)
    else:
        inputs = torch.randn(batch, *shape, generator=generator)
    return it.options(shape, _CLASSES[it.takes], published=True), inputs
