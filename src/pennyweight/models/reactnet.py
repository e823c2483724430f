"""ReActNet-A, a MobileNet made for signs (ReActNet, arXiv 2003.03488; structure as in liuzechun/ReActNet).

One block has a 3x3 convolution (dense, not depthwise, since a sign has nothing to say channel by channel) and a 1x1
convolution, with a shortcut around each:

    h = RPReLU(norm(conv3x3(x)) + x)                              x averaged over 2x2 where the block halves the image
    y = RPReLU(norm(conv1x1(h)) + h)                              where the width stays
    y = RPReLU(cat(norm(conv1x1(h)) + h, norm(conv1x1'(h)) + h))  where it doubles: two copies, so no shortcut is lost

Stem: 3x3 convolution of stride 2 to 32 channels and a norm. Then 13 blocks to 64, 128, 128, 256, 256, 512 (six times),
1024, 1024 channels, average, linear layer. Stem and linear layer stay real. At 224 pixels: 29.3 M parameters, 4.82 G
binary and 12 M real multiplications [paper].

The learned shift before each sign (RSign) belongs to the quantiser of the convolution's input, hence not in here: this
is the real-valued network. The signs of two convolutions that share their input see one shift in the authors' code, two
when each has its own quantiser.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.rprelu import RPReLU

#: (width after the block in units of the stem's, whether it halves the image)
BLOCKS = (
    (2, False),
    *((4, True), (4, False)),
    *((8, True), (8, False)),
    *((16, True), *[(16, False)] * 5),
    *((32, True), (32, False)),
)


class ReActBlock(nn.Module):
    """[batch, channels, h, w] -> [batch, out_channels, ceil(h / stride), ceil(w / stride)]."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.spatial = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.spatial_norm = nn.BatchNorm2d(channels)
        self.spatial_activation = RPReLU(channels)
        copies = out_channels // channels
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(copies))
        self.pointwise_norm = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(copies))
        self.pointwise_activation = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        around = F.avg_pool2d(x, 2, 2, ceil_mode=True) if self.stride == 2 else x
        x = self.spatial_activation(self.spatial_norm(self.spatial(x)) + around)
        halves = [norm(convolution(x)) + x for convolution, norm in zip(self.pointwise, self.pointwise_norm)]
        return self.pointwise_activation(torch.cat(halves, 1))


class ReActNet(nn.Module):
    """Images [batch, in_channels, h, w] -> logits [batch, num_classes]; any size, the end is averaged over."""

    def __init__(self, num_classes: int, width: int, in_channels: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential()
        channels = width
        for factor, halves in BLOCKS:
            self.blocks.append(ReActBlock(channels, factor * width, 2 if halves else 1))
            channels = factor * width
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem_norm(self.stem(x))).mean((2, 3)))


def reactnet(num_classes: int = 1000, width: int = 32, *, in_channels: int = 3, stem_stride: int = 2) -> ReActNet:
    """ReActNet-A; see the module. width: channels of the stem. stem_stride: 2, or 1 for images of about 32 pixels."""
    return ReActNet(num_classes, width, in_channels, stem_stride)
