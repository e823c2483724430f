"""Groups along the input: `group` consecutive columns of a row share a scale; the last of a row may be shorter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import WeightError


def group_count(cols: int, group: int) -> int:
    """Groups in a row; group 0 means the whole row."""
    return -(-cols // group) if group else min(cols, 1)


def check_group(group: int) -> None:
    if group < 0:
        raise WeightError(f"group is {group}; it must be a number of columns, or 0 for the whole row")


def combine(op: Callable[[Tensor, Tensor], Tensor], matrix: Tensor, values: Tensor, group: int) -> Tensor:
    """op(matrix [..., cols], values [..., groups] spread over their columns), e.g. torch.mul."""
    cols, groups = matrix.shape[-1], values.shape[-1]
    if groups == 1:
        return op(matrix, values)
    if groups * group == cols:
        return op(matrix.reshape(*matrix.shape[:-1], groups, group), values.unsqueeze(-1)).reshape(matrix.shape)
    return op(matrix, values.repeat_interleave(group, -1)[..., :cols]) if groups else matrix


def grouped(matrix: Tensor, group: int, fill: float) -> Tensor:
    """matrix [rows, cols] -> [rows, groups, group], the last group filled up with `fill`."""
    group = group or max(matrix.shape[1], 1)
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % group), value=fill)
    return padded.unflatten(-1, (-1, group)) if matrix.shape[1] else matrix.view(matrix.shape[0], 0, group)
