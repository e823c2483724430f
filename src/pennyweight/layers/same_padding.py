"""Convolution and pooling padded to ceil(size / stride) outputs, as XLA and TensorFlow do it ("SAME").

    total = max((ceil(n / stride) - 1) stride + kernel - n, 0);   before = floor(total / 2);   after = total - before

With an odd kernel and stride 1 this is padding on both sides alike. With stride 2 it depends on the size: a kernel of 3
pads an even size by (0, 1), where torch's padding=1 gives (1, 0) in effect and looks at pixels one to the left.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis of that size."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """x [..., height, width] with the zeros around it."""
    height = same_padding(x.shape[-2], kernel[0], stride[0])
    width = same_padding(x.shape[-1], kernel[1], stride[1])
    return F.pad(x, (*width, *height))


class SameConv2d(nn.Conv2d):
    """nn.Conv2d [batch, in, height, width] -> [batch, out, ceil(height / stride), ceil(width / stride)].

    The zeros are added inside the layer, after what a forward pre-hook makes of the input: a quantised input is padded
    with zeros, not with quantised zeros.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=0, **options)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(pad_same(input, self.kernel_size, self.stride), weight, bias)


def average_pool_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Average pooling of [batch, channels, height, width]; the zeros around the image count in the average."""
    return F.avg_pool2d(pad_same(x, (kernel, kernel), (stride, stride)), kernel, stride)
