"""ResNet-20 on CIFAR-10: the pretrained network with its norms folded into the convolutions, and its top-1 x100.

fp32: 91.73 on the 10,000 test images. Norms are folded for every side of the comparison, so that nobody stores them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import data

Predict = Callable[[Tensor], Tensor]


def load_resnet(pretrained: bool = True) -> nn.Module:
    """A fresh fp32 ResNet-20 in eval mode, norms folded."""
    model = data.sets().resnet_cifar(20, pretrained=pretrained)
    for block in [m for m in model.modules() if hasattr(m, "bn1")]:
        for i in ("1", "2"):
            if hasattr(block, "bn" + i):
                setattr(block, "conv" + i, fuse_conv_bn_eval(getattr(block, "conv" + i), getattr(block, "bn" + i)))
                setattr(block, "bn" + i, nn.Identity())
    return model.requires_grad_(False)


def images(split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` normalised images float32 [n, 3, 32, 32] and their labels [n]."""
    x, y = data.sets().cifar10(split, **({"batches": (1,)} if split == "train" else {}))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in data.sets().CIFAR_NORM)
    return (torch.from_numpy(x[:count]).permute(0, 3, 1, 2) / 255 - mean) / std, torch.from_numpy(y[:count]).long()


def batches(count: int = 1024, batch_size: int = 64) -> list[dict[str, Tensor]]:
    """Training images without labels, as keyword arguments of the network's forward."""
    return [{"x": x} for x in images("train", count)[0].split(batch_size)]


def predict_with(model: nn.Module) -> Predict:
    """A function from images to logits [n, 10]."""

    @torch.inference_mode()
    def predict(x: Tensor) -> Tensor:
        return torch.cat([model(part).float() for part in x.split(250)])

    return predict


def evaluate(predict: Predict) -> dict[str, float]:
    """dev and unseen: top-1 x100 on all test images (nothing is chosen by them, so they serve as both);
    cosine: of the logits to the original's."""
    x, y = images("test", 10_000)
    logits = predict(x)
    accuracy = 100 * float((logits.argmax(1) == y).double().mean())
    return {"dev": accuracy, "unseen": accuracy, "cosine": float(F.cosine_similarity(logits, _original()).mean())}


@cache
def _original() -> Tensor:
    return predict_with(load_resnet())(images("test", 10_000)[0])
