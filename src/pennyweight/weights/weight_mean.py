"""MimicNorm's centred filters, arXiv 2010.09278: W = V - mean(V) of each output, in place of inner norms.

The released code subtracts the mean from the stored weight after every step instead. For SGD, with momentum and decay,
both train the same network (the projection is linear and idempotent); for optimizers that scale each number by itself,
such as Adam, they differ: there this form keeps the gradient's mean out of the optimizer's state.
"""

from __future__ import annotations

from torch import Tensor

from ..registry import register
from .base import WeightTransform, require_finite


@register(
    "weight-mean",
    acts_on="weights",
    paper="2010.09278",
    description="filters of mean zero (MimicNorm); chains before low-bit weights",
)
class WeightMean(WeightTransform):
    """W - mean(W) of each output; a single weight an output stays as it is."""

    def __init__(self) -> None:  # no options: torch's own constructor would take any
        super().__init__()

    def fit(self, weight: Tensor) -> None:
        require_finite(weight)

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        if rows.shape[1] < 2:
            return weight
        return (rows - rows.mean(1, keepdim=True)).view_as(weight)
