"""The noise adaptation module of FDA, arXiv 2103.00841: what binarised values are off by, for as long as they train.

    eta(x) = W2 ReLU(W1 x) + 0.1 sin(x)              over the last axis, d -> hidden -> d, no biases
    lambda = 0.05 (1 + cos(pi progress))             0.1 at the start, 0 at the end: then the network is binary

hidden is d / 64, d / 4 where that is less than one (the released fall-back cannot fire: a width of 0 is no error), and
at least 1. W1 and W2 start as linear layers do. Both are trained, and dropped when the model is converted.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHARES = (64, 4)


class NoiseAdaptation(nn.Module):
    """x [..., width] -> lambda eta(x), the same shape. Nothing is computed in eval mode once lambda is 0."""

    training_only: ClassVar[bool] = True
    progress: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(*((width // share for share in _SHARES) if width < _SHARES[0] else (width // _SHARES[0],)), 1)
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.register_buffer("progress", torch.zeros(()))

    def strength(self) -> Tensor:
        """lambda, a scalar."""
        return 0.05 * (1 + torch.cos(math.pi * self.progress))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.is_over():
            return torch.zeros_like(x)
        return self.strength().to(x.dtype) * (self.up(F.relu(self.down(x))) + 0.1 * torch.sin(x))

    def is_over(self) -> bool:
        """Whether nothing is added any more."""
        return float(self.strength()) == 0.0
