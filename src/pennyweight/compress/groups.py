"""Parts that several compressors share: the check of a layer's numbers and the cutting of its columns into groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError, WeightError
from .contract import LayerView

_CHUNK_ELEMENTS = 1 << 18  # float32 chunks of 1 MiB: a handful of temporaries stays in the processor's cache


def require_finite(layer: LayerView) -> None:
    """Raise `WeightError` for NaN or infinite weights, `DataError` for a metric that is not finite."""
    if not bool(torch.isfinite(layer.weight).all()):
        raise WeightError(f"{layer.name}: the weight holds NaN or infinite values; repair or retrain the checkpoint")
    if not bool(torch.isfinite(layer.hessian).all() and torch.isfinite(layer.row_weight).all()):
        raise DataError(f"{layer.name}: its input statistics are not finite; look for NaN in the calibration data")


def group_size(layer: LayerView, group: int) -> int:
    """Columns per group, where 0 (or more than there are) means the whole row."""
    return layer.cols if group == 0 else min(group, layer.cols)


def column_groups(matrix: Tensor, group: int) -> Tensor:
    """[rows, cols] -> [rows, ceil(cols / group), group]; a short last group is filled with copies of its last column.

    A copy leaves the group's smallest and largest value as they are.
    """
    short = -matrix.shape[-1] % group
    if short:
        matrix = F.pad(matrix[:, None], (0, short), mode="replicate")[:, 0]
    return matrix.unflatten(-1, (-1, group))


def column_group_weight(column_weight: Tensor, group: int) -> Tensor:
    """float32 [ceil(cols / group), group] of [cols] weights, scaled to mean 1; filled-up columns weigh nothing."""
    weight = (column_weight / column_weight.mean()).float()
    return F.pad(weight, (0, -weight.shape[0] % group)).unflatten(0, (-1, group))


def row_chunks(matrix: Tensor) -> Iterator[Tensor]:
    """Consecutive pieces of whole rows, each of about a megabyte."""
    return iter(matrix.split(max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))))
