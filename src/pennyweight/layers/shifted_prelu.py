"""Leaky rectifiers with a learned shift before and after: what the blocks of binary networks pass real values through.

    RPReLU (ReActNet, arXiv 2003.03488):    f(x) = prelu(x + b) + c                 slope 1 where x + b >= 0
    DPReLU (PokeBNN, arXiv 2112.00133):     f(x) = s (x - p) - r                    s = s_pos if x >= p, else s_neg

All are learned per channel, axis 1 of the input. RPReLU is DPReLU with s_pos fixed to 1 (p = -b, r = -c); both start as
the leaky rectifier of slope 0.25. At the kink itself the gradient is that of the right-hand side, as in the code of
PokeBNN. Departure from it: the result has the input's dtype; theirs is always bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEGATIVE_SLOPE = 0.25


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


class RPReLU(nn.Module):
    """x [batch, channels, ...] -> the same shape. Parameters [channels]: `shift`, `slope`, `offset`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), NEGATIVE_SLOPE))
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x + _per_channel(self.shift, x), self.slope) + _per_channel(self.offset, x)

    def extra_repr(self) -> str:
        return f"{self.slope.numel()}"


class DPReLU(nn.Module):
    """x [batch, channels, ...] -> the same shape.

    Parameters [channels]: `shift` (p), `positive_slope`, `negative_slope`, `offset` (r).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.positive_slope = nn.Parameter(torch.ones(channels))
        self.negative_slope = nn.Parameter(torch.full((channels,), NEGATIVE_SLOPE))
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x - _per_channel(self.shift, x)
        slope = torch.where(x >= 0, _per_channel(self.positive_slope, x), _per_channel(self.negative_slope, x))
        return slope * x - _per_channel(self.offset, x)

    def extra_repr(self) -> str:
        return f"{self.offset.numel()}"
