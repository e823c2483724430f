"""RPReLU of ReActNet, arXiv 2003.03488: PReLU whose kink is learned in both coordinates.

    f(x) = x - g + z                 x > g
         = slope (x - g) + z         otherwise           g, z, slope: one a channel, initially 0, 0 and 0.25

The released code writes it as x + b1 -> PReLU -> + b2, the same with b1 = -g and b2 = z: so it is here.
It belongs to the architecture: models use it where they would use PReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import register


@register("rprelu", acts_on="layers", paper="2003.03488", description="PReLU between two learned shifts (ReActNet)")
class RPReLU(nn.Module):
    """x [samples, channels, ...] -> the same shape. Parameters shift_in, shift_out, slope: [channels]."""

    def __init__(self, channels: int, slope: float = 0.25) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels))
        self.shift_out = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return F.prelu(x + self.shift_in.view(shape), self.slope) + self.shift_out.view(shape)

    def extra_repr(self) -> str:
        return f"channels={len(self.slope)}"
