"""PokeBNN: A Binary Pursuit of Lightweight Accuracy, arXiv 2112.00133: a ResNet-50 in shape, made for signs.

PokeConv(x, r1) to `out` channels, r1 the input of the block and given to its last convolution only:

    h = norm(conv(x))                            binary; the norm before r1 is added starts with gamma = 0
    h = h + reshape(x, pad)                      local shortcut, always
    h = h + reshape(r1, tile)                    block shortcut
    y = norm(DPReLU(h) * gate(x))                gate(x) = relu6(W2 relu(W1 mean(x) + b1) + b2 + 3) / 6, W1 to C/8

`reshape` has no parameters: channels become the means of consecutive groups (fewer), or are padded with zeros or
repeated as a whole (more); a differing size is pooled 3x3 with stride 2. A block is PokeConv 1x1 (f), 3x3 (f, stride),
1x1 (4f); stages f = 64, 128, 256, 512 times the width, of 3, 4, 6, 3 blocks. PokeInit, the stem: 4x4 convolution of
stride 4 to 32 channels, no pixel used twice; norm, DPReLU; 3x3 convolution in 32 groups to 64 channels; norm, DPReLU.

This is the network with real values. `precision(model)` says the bits of every layer: 1 in the blocks, 4 in the gates,
8 in stem and head.

Departures: at even sizes the released code pads a stride of 2 on the right and below ("SAME"), torch on the left and
above, convolutions and poolings alike: this is their network in a mirror, with mirrored kernels, and learns the same.
Where 4f is no multiple of 64 (width 1.4, the published model of 7.8 G ACE), the released code cannot build the block
shortcut of the first block; here the channels are repeated as often as needed and cut. Where it can, this is the same.
Values keep the input's dtype; theirs are bfloat16 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnknownNameError
from ..layers.dprelu import DPReLU
from ..layers.precision import Precision

#: Width multipliers by the name of the variant.
VARIANTS = {f"{width}x": width for width in (0.5, 0.75, 1.0, 1.25, 1.4, 1.5, 1.75, 2.0)}
#: (features of the stage at width 1, blocks)
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
STEM_GROUPS, STEM_CHANNELS, EXPANSION, GATE_REDUCTION = 32, 64, 4, 8

BINARY = Precision(1, 1)
GATE_SQUEEZE, GATE_EXCITE = Precision(4, 4), Precision(4, 4, signed_input=False)
STEM_AND_HEAD = Precision(8, 8)


def reshape_shortcut(source: Tensor, channels: int, size: torch.Size, more: Literal["pad", "tile"]) -> Tensor:
    """source [batch, c, h, w] as [batch, channels, *size]; `more`: what makes up for missing channels."""
    have = source.shape[1]
    if have > channels:
        group = have // channels
        grouped = source[:, : channels * group].unflatten(1, (channels, group))
        source = grouped.mean(2)
    elif have < channels and more == "pad":
        source = F.pad(source, (0, 0, 0, 0, 0, channels - have))
    elif have < channels:
        source = source.repeat(1, -(-channels // have), 1, 1)[:, :channels]
    return source if source.shape[2:] == size else F.avg_pool2d(source, 3, 2, padding=1)


class Gate(nn.Module):
    """Squeeze and excite: x [batch, channels, h, w] -> factors in 0..1, [batch, out_channels, 1, 1]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        if channels < GATE_REDUCTION:
            raise ValueError(f"the gates of PokeBNN need at least {GATE_REDUCTION} channels, not {channels}; widen it")
        self.squeeze = nn.Conv2d(channels, channels // GATE_REDUCTION, 1)
        self.excite = nn.Conv2d(channels // GATE_REDUCTION, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return F.relu6(self.excite(hidden) + 3) / 6


class PokeConv(nn.Module):
    """x [batch, channels, h, w] -> [batch, out_channels, ceil(h / stride), ceil(w / stride)]; see the module."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, last: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = DPReLU(out_channels)
        self.gate = Gate(channels, out_channels)
        self.output_norm = nn.BatchNorm2d(out_channels)
        if last:
            nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor, block_input: Tensor | None = None) -> Tensor:
        h = self.norm(self.convolution(x))
        channels, size = h.shape[1], h.shape[2:]
        h = h + reshape_shortcut(x, channels, size, "pad")
        if block_input is not None:
            h = h + reshape_shortcut(block_input, channels, size, "tile")
        return self.output_norm(self.activation(h) * self.gate(x))


class PokeBlock(nn.Module):
    """x [batch, channels, h, w] -> [batch, 4 features, ceil(h / stride), ceil(w / stride)]."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.reduce = PokeConv(channels, features, 1)
        self.spatial = PokeConv(features, features, 3, stride)
        self.expand = PokeConv(features, EXPANSION * features, 1, last=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.spatial(self.reduce(x)), block_input=x)


class PokeInit(nn.Module):
    """Images [batch, in_channels, h, w] -> [batch, 64, h // patch, w // patch]."""

    def __init__(self, in_channels: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, STEM_GROUPS, patch, patch, bias=False)
        self.patches_norm = nn.BatchNorm2d(STEM_GROUPS)
        self.patches_activation = DPReLU(STEM_GROUPS)
        self.grouped = nn.Conv2d(STEM_GROUPS, STEM_CHANNELS, 3, padding=1, groups=STEM_GROUPS, bias=False)
        self.grouped_norm = nn.BatchNorm2d(STEM_CHANNELS)
        self.grouped_activation = DPReLU(STEM_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches_activation(self.patches_norm(self.patches(x)))
        return self.grouped_activation(self.grouped_norm(self.grouped(x)))


class PokeBNN(nn.Module):
    """Images [batch, in_channels, h, w] -> logits [batch, num_classes].

    width: of the published family, 1 for ResNet-50's channels. stages: (features at width 1, blocks). patch: of the
    stem; 4, or 2 and 1 for small images. Raises ValueError where a gate would have no hidden unit.
    """

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        stages: tuple[tuple[int, int], ...] = STAGES,
        patch: int = 4,
    ) -> None:
        super().__init__()
        self.stem = PokeInit(in_channels, patch)
        self.blocks = nn.Sequential()
        channels = STEM_CHANNELS
        for index, (base, count) in enumerate(stages):
            features = int(base * width)
            for block in range(count):
                self.blocks.append(PokeBlock(channels, features, 2 if index and not block else 1))
                channels = EXPANSION * features
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _lecun_normal_(module)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _lecun_normal_(layer: nn.Conv2d | nn.Linear) -> None:
    """Variance 1 / inputs, cut at two standard deviations; bias 0."""
    shrinkage = 0.87962566103423978  # standard deviation of a standard normal cut at -2 and 2
    deviation = math.sqrt(1 / layer.weight[0].numel()) / shrinkage
    nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def pokebnn(variant: str = "1.0x", num_classes: int = 1000, *, in_channels: int = 3, patch: int = 4) -> PokeBNN:
    """The published network of that width, "0.5x" to "2.0x" (`VARIANTS`). Raises UnknownNameError for another."""
    if variant not in VARIANTS:
        raise UnknownNameError("PokeBNN variant", variant, VARIANTS)
    return PokeBNN(VARIANTS[variant], num_classes, in_channels=in_channels, patch=patch)


def precision(model: PokeBNN) -> dict[str, Precision]:
    """Bits of each layer as published, by the layer's name."""
    return dict(_precision(model))


def _precision(model: PokeBNN) -> Iterator[tuple[str, Precision]]:
    for name, module in model.named_modules():
        if isinstance(module, PokeConv):
            yield f"{name}.convolution", BINARY
            yield f"{name}.gate.squeeze", GATE_SQUEEZE
            yield f"{name}.gate.excite", GATE_EXCITE
    for name in ("stem.patches", "stem.grouped", "head"):
        yield name, STEM_AND_HEAD
