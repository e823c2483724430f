"""Round to nearest with a searched range: each group of columns gets the scale (and minimum) that loses least.

No paper stands behind it; it is the floor every other quantiser is measured against, and the search is what the good
implementations of that floor do (grid.py). The whole is compared with plain rounding at the end: the result is
never worse than that in the weighted error.
"""

from __future__ import annotations

from typing import Any

import torch

from ..formats import Integer
from ..registry import register
from .contract import Compressor, LayerView
from .grid import layer_grid
from .groups import column_groups, group_size, require_finite


@register("rtn", acts_on="compress", description="round to nearest: groupwise integers, each group's range searched")
class RoundToNearest(Compressor):
    """Groupwise integers of 2 to 8 bits, each group's range searched in the layer's diagonal metric."""

    name = "rtn"

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        wanted = [(2, 64), (2, 32), (3, 128), (3, 64), (4, 128), (4, 32), (5, 64), (6, 64), (8, 0)]
        fits = {(bits, group if group < layer.cols else 0): None for bits, group in wanted}
        return [{"bits": bits, "group": group} for bits, group in fits]

    def compress(
        self, layer: LayerView, bits: int = 4, group: int = 64, symmetric: bool = False, clip: bool = True
    ) -> Integer:
        """bits 2..8; group: columns per scale, 0 = whole row; clip: search the range (False: minimum to maximum).

        Raises `WeightError` or `DataError` if the layer's numbers are not finite.
        """
        require_finite(layer)
        plain = Integer.encode(layer.weight, bits, group, symmetric)
        if not clip:
            return plain
        grid = layer_grid(layer, bits, group, symmetric=symmetric)
        codes = grid.codes(column_groups(layer.weight, group_size(layer, group)), bits).flatten(1)[:, : layer.cols]
        found = Integer.from_codes(codes.to(torch.int16), grid.scale, grid.minimum, bits=bits, group=group)
        return min(found, plain, key=lambda packed: _weighted_error(layer, packed))


def _weighted_error(layer: LayerView, packed: Integer) -> float:
    return float((packed.decode().sub_(layer.weight).square_().sum(0, dtype=torch.float64) * layer.column_weight).sum())
