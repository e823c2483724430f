"""Signs with group scales: one bit a weight, the scale of each group the best there is in the layer's diagonal metric.

The scaled sign goes back to XNOR-Net (arXiv 1603.05279), whose scale is the plain mean of |w|. Here each column counts
by its weight c in the layer's metric. For fixed signs the weighted error is a parabola in the scale a:

    sum_j c_j (w_j - a sign(w_j))^2    is least at    a = sum_j c_j |w_j| / sum_j c_j

and no other choice of signs does better at any a >= 0. sign(0) is +.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import Binary
from ..registry import register
from .contract import Compressor, LayerView
from .groups import column_group_weight, column_groups, group_size, require_finite


def weighted_scale(weight: Tensor, column_weight: Tensor, group: int) -> Tensor:
    """Weighted mean of |weight| per group: [rows, cols], [cols] -> float32 [rows, ceil(cols / group)].

    A group whose columns all weigh nothing gets the plain mean.
    """
    weights = column_group_weight(column_weight, group)
    present = column_group_weight(torch.ones_like(column_weight), group)  # 0 where the last group is filled up
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, present)
    weights = weights / weights.sum(-1, keepdim=True)
    return (column_groups(weight.abs(), group) * weights).sum(-1)


@register(
    "binary", acts_on="compress", paper="1603.05279", description="signs with group scales, weighted by the inputs"
)
class BinaryScales(Compressor):
    """One bit a weight and one fp16 scale a group."""

    name = "binary"

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        return [{"group": 0}, *({"group": group} for group in (128, 64, 32) if group < layer.cols)]

    def compress(self, layer: LayerView, group: int = 64) -> Binary:
        """group: columns per scale, 0 = whole row. Raises `WeightError` or `DataError` if numbers are not finite."""
        require_finite(layer)
        size = group_size(layer, group)
        scale = weighted_scale(layer.weight, layer.column_weight, size)
        return Binary.from_signs(layer.weight >= 0, scale, group if size == group else 0)
