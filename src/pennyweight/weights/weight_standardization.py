"""Weight standardization: every filter with mean 0 and variance 1, for layers that a norm follows.

Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, arXiv 1903.10520. Of an output's I
weights W, with m their mean and var their variance:

    W^ = (W - m) / s                         s = sqrt(var + eps)   or   sqrt(var) + eps
    W^ = gain (W - m) / (s sqrt(I))          with a `gain`, for networks without norms: sqrt(2 / (1 - 1/pi)) = 1.7129
                                             keeps the variance through ReLU layers
    dL/dW = (1/s) P(G - <W^, G> W^ / I),     P(z) = z - mean(z), G = dL/dW^ (biased variance, eps -> 0): orthogonal to
                                             1 and to W - m

s has four spellings in circulation, which `eps`, `eps_inside` and `unbiased` tell apart. The default is that of the
authors' second repository; the next norm makes up for most of the difference, but not for that of eps in small filters.

    eps_inside  unbiased
    true        true        Batch-Channel-Normalization repository
    false       true        WeightStandardization repository (the shipped GroupNorm checkpoints)
    false       false       TensorFlow snippet, BiT models
    true        false       the paper; F.batch_norm of the weight seen as [1, O, I]

Filters of a single weight (1x1 depthwise) have no variance and stay as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import PlanError
from ..registry import register
from .base import WeightTransform, require_finite


def standardise(weight: Tensor, eps: float = 1e-5, eps_inside: bool = True, unbiased: bool = True) -> Tensor:
    """W^ of a weight [outputs, ...], of its shape; at least two weights an output."""
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (rows.shape[1] - int(unbiased))
    s = (variance + eps).sqrt() if eps_inside else variance.sqrt() + eps
    return (centred / s).view_as(weight)


@register(
    "weight-standardization",
    acts_on="weights",
    paper="1903.10520",
    description="filters of mean 0 and variance 1 before a norm; chains before low-bit weights",
)
class WeightStandardization(WeightTransform):
    """See the module. Means and variances are taken in float32 at least. Raises `PlanError` unless eps is positive."""

    def __init__(
        self, eps: float = 1e-5, eps_inside: bool = True, unbiased: bool = True, gain: float | None = None
    ) -> None:
        super().__init__()
        if not eps > 0:
            raise PlanError(f"weight-standardization: eps is {eps:g}; it must be positive, filters may be constant")
        self.eps, self.eps_inside, self.unbiased, self.gain = eps, eps_inside, unbiased, gain

    def fit(self, weight: Tensor) -> None:
        require_finite(weight)

    def forward(self, weight: Tensor) -> Tensor:
        size = weight[0].numel()
        if size < 2:
            return weight
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        made = standardise(wide, self.eps, self.eps_inside, self.unbiased)
        if self.gain is not None:
            made = made * (self.gain / math.sqrt(size))
        return made.to(weight.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, eps_inside={self.eps_inside}, unbiased={self.unbiased}, gain={self.gain}"
