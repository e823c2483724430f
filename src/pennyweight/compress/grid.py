"""Search of a group's range: the scale (and minimum) with which rounding to nearest loses least.

    asymmetric  w ~ scale * q + minimum,  q in [0, 2^bits - 1]
    symmetric   w ~ scale * q,            q in [-2^(bits-1), 2^(bits-1) - 1]
    chosen      argmin over ranges of  sum_j c_j (w_j - decoded_j)^2

The ranges tried are the full one, the full one shrunk about its middle by fixed factors, and then the weighted
least-squares line through the codes found so far. Errors are taken with scales rounded as they are stored; a range
replaces the full one only where it loses less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import Integer
from .contract import LayerView
from .groups import column_group_weight, column_groups, group_size, row_chunks

_SHRINK = {2: (0.9, 0.8, 0.7, 0.6, 0.5), 3: (0.92, 0.84, 0.76, 0.68), 4: (0.95, 0.9, 0.85, 0.8)}
_SHRINK_MORE_BITS = (0.97, 0.93, 0.88)  # the finer the grid, the less is gained by giving up its ends
_REFITS = 2


class Grid(NamedTuple):
    """The numbers of each group: scale and minimum (None if symmetric), float32 [rows, n_groups]."""

    scale: Tensor
    minimum: Tensor | None

    def codes(self, weight: Tensor, bits: int) -> Tensor:
        """Nearest codes, float32 like `weight` [rows, n_groups, group]; a zero scale gives code 0."""
        scale = torch.where(self.scale > 0, self.scale, 1.0)[..., None]
        if self.minimum is None:
            return (weight / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (weight - self.minimum[..., None]).div_(scale).round_().clamp_(0, 2**bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        values = codes * self.scale[..., None]
        return values if self.minimum is None else values.add_(self.minimum[..., None])


def search_grid(weight: Tensor, column_weight: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """The best grid found for each group. weight: float32 [rows, n_groups, group]; column_weight: [n_groups, group]."""

    def loss_of(grid: Grid) -> tuple[Tensor, Tensor]:
        codes = grid.codes(weight, bits)
        return grid.decode(codes).sub_(weight).square_().mul_(column_weight).sum(-1), codes

    best, *others = _ranges(weight, bits, symmetric)
    least, codes = loss_of(best)

    def keep_better(grid: Grid) -> None:
        nonlocal best, least, codes
        loss, new_codes = loss_of(grid)
        better = loss < least
        scale = torch.where(better, grid.scale, best.scale)
        minimum = best.minimum
        if minimum is not None and grid.minimum is not None:
            minimum = torch.where(better, grid.minimum, minimum)
        best = Grid(scale, minimum)
        least = torch.where(better, loss, least)
        codes = torch.where(better[..., None], new_codes, codes)

    for grid in others:
        keep_better(grid)
    for _ in range(_REFITS):
        keep_better(_fit_line(weight, codes, column_weight, symmetric))
    return best


def _ranges(weight: Tensor, bits: int, symmetric: bool) -> Iterator[Grid]:
    """The full range, then shrunk ones."""
    low, high = weight.amin(-1), weight.amax(-1)
    factors = _SHRINK.get(bits, _SHRINK_MORE_BITS)
    if symmetric:
        peak = torch.maximum(high, -low)
        for factor in (1.0, 1.0 - 2.0**-bits, *factors):
            yield Grid(Integer.round_scale(peak * (factor / (2 ** (bits - 1) - 1))), None)
        return
    middle, half = (high + low) / 2, (high - low) / 2
    for factor in (1.0, *factors):
        minimum = Integer.round_minimum(low if factor == 1.0 else middle - half * factor)
        top = high if factor == 1.0 else middle + half * factor
        yield Grid(Integer.round_scale((top - minimum).clamp_min(0) / (2**bits - 1)), minimum)


def _fit_line(weight: Tensor, codes: Tensor, column_weight: Tensor, symmetric: bool) -> Grid:
    """Weighted least squares of weight on codes: slope and intercept (slope alone if symmetric); 0 where undefined."""
    weighted = codes * column_weight
    square, product = (weighted * codes).sum(-1), (weighted * weight).sum(-1)
    if symmetric:
        return Grid(_rounded_scale(product / square), None)
    total = column_weight.sum(-1)
    codes_mean, mean = weighted.sum(-1) / total, (weight * column_weight).sum(-1) / total
    scale = _rounded_scale((product - total * codes_mean * mean) / (square - total * codes_mean.square()))
    return Grid(scale, Integer.round_minimum(torch.nan_to_num(mean - scale * codes_mean, 0.0, 0.0, 0.0)))


def _rounded_scale(scale: Tensor) -> Tensor:
    return Integer.round_scale(torch.nan_to_num(scale, 0.0, 0.0, 0.0).clamp_min(0))


def layer_grid(layer: LayerView, bits: int, group: int, *, symmetric: bool) -> Grid:
    """The searched grid of every group of a layer in its diagonal metric, rounded as stored: [rows, groups] each."""
    size = group_size(layer, group)
    column_weight = column_group_weight(layer.column_weight, size)
    grids = [
        search_grid(column_groups(rows, size), column_weight, bits, symmetric=symmetric)
        for rows in row_chunks(layer.weight)
    ]
    scale = Integer.round_scale(torch.cat([grid.scale for grid in grids]))
    if symmetric:
        return Grid(scale, None)
    return Grid(scale, Integer.round_minimum(torch.cat([grid.minimum for grid in grids if grid.minimum is not None])))
