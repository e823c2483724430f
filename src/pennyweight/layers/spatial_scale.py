"""XNOR-Net++, arXiv 1909.13863: one learned scale for outputs, rows and columns each, instead of magnitudes.

    y[n, o, h, w]  ->  y[n, o, h, w] * beta_h * gamma_w          a Conv1d has gamma alone; initially 1

The third factor, alpha_o, is the learned scale of the weights (`binary` with scale "learned" from ones). The released
code slices vectors of length 2000; here their length is the option `positions`, 256 by default. The scales depend on
the position, so that they stay real in a converted layer, and batch norm behind them is not folded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DataError, PlanError
from ..registry import register
from .base import LayerTransform


@register("spatial-scale", acts_on="layers", paper="1909.13863", description="learned scales by position (XNOR-Net++)")
class SpatialScale(LayerTransform):
    """[samples, outputs, height, width] or [samples, outputs, length]; Linear outputs pass as they are.

    positions: the largest height and width, at least 1 (`PlanError`). A larger output raises `DataError`.
    """

    def __init__(self, positions: int = 256) -> None:
        super().__init__()
        if positions < 1:
            raise PlanError(f"'spatial-scale' needs at least one position, not {positions}")
        self.positions = positions
        self.scales = nn.ParameterList()

    def for_layer(self, layer: nn.Module) -> None:
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            raise PlanError(f"'spatial-scale' serves Linear, Conv1d and Conv2d, not {type(layer).__name__}")
        axes = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        self.scales.extend(
            nn.Parameter(torch.ones_like(layer.weight[:1].flatten()[:1]).repeat(self.positions)) for _ in range(axes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for axis, scale in enumerate(reversed(self.scales), start=1):
            size = x.shape[-axis]
            if size > self.positions:
                raise DataError(
                    f"the output has {size} positions, its spatial scale {self.positions}; set positions in the recipe"
                )
            x = x * scale[:size].view(-1, *[1] * (axis - 1))
        return x
