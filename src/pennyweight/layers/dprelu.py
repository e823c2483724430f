"""DPReLU of PokeBNN, arXiv 2112.00133: a PReLU that learns both slopes, and its kink in both coordinates.

    f(x) = s (x - p) - r        s = s_pos if x >= p, else s_neg        per channel, initially 1, 0.25, p = r = 0

RPReLU is the case s_pos = 1. At the kink the gradient is that of its right-hand side, as in the released code.
Departure from it: the result has the input's dtype; theirs is bfloat16. It belongs to the architecture, as RPReLU does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..registry import register


@register(
    "dprelu", acts_on="layers", paper="2112.00133", description="PReLU with two learned slopes and shifts (PokeBNN)"
)
class DPReLU(nn.Module):
    """x [samples, channels, ...] -> the same shape. Parameters [channels]: shift_in, shift_out, positive_slope, slope.

    slope: that of the negative side, as in RPReLU.
    """

    def __init__(self, channels: int, slope: float = 0.25) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels))
        self.shift_out = nn.Parameter(torch.zeros(channels))
        self.positive_slope = nn.Parameter(torch.ones(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        x = x - self.shift_in.view(shape)
        slope = torch.where(x >= 0, self.positive_slope.view(shape), self.slope.view(shape))
        return slope * x - self.shift_out.view(shape)

    def extra_repr(self) -> str:
        return f"channels={len(self.slope)}"
