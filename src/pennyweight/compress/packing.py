"""Make one layer's packed weight as a line of the plan says: one method, or two that divide its rows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..formats import PackedWeight, Split
from .contract import Compressor, LayerView, compressor
from .plan import Choice, SplitChoice

_DIVIDE_ROUNDS = 12


def pack(view: LayerView, choice: Choice) -> tuple[PackedWeight, Choice]:
    """Make one layer's packed weight as its plan line says, and the line that says what was made.

    Where the line predicts bytes they are a target: methods with a knob are turned towards it, divided layers are
    divided anew.
    """
    method, split, target = compressor(choice.method), choice.split, choice.nbytes
    if target is not None and is_adjustable(choice.method) and (split is None or is_adjustable(split.method)):
        packed, options, larger = method.fit(view, choice.options, target)
        made = dataclasses.replace(choice, options=options, split=None)
        if larger is not None:
            parts = dataclasses.replace(made, split=SplitChoice(choice.method, larger, 0.5))
            divided = divide(view, parts, target)
            if divided is not None and divided[0].nbytes > packed.nbytes:
                return divided
    elif split is None:
        packed, made = method.compress(view, **choice.options), choice
    elif target is not None and (divided := divide(view, choice, target)) is not None:
        return divided
    else:
        packed, made = _divided(view, choice, round(split.fraction * view.rows)), choice
    return packed, dataclasses.replace(made, nbytes=packed.nbytes)


def divide(view: LayerView, choice: Choice, nbytes: int) -> tuple[PackedWeight, Choice] | None:
    """Give as many rows to the split's method as `nbytes` allows; None if not even one row each way fits."""
    assert choice.split is not None
    low, high, best = 1, view.rows - 1, None
    for _ in range(_DIVIDE_ROUNDS):
        if low > high:
            break
        middle = (low + high) // 2
        packed = _divided(view, choice, middle)
        if packed.nbytes <= nbytes:
            best, low = (packed, middle), middle + 1
        else:
            high = middle - 1
    if best is None:
        return None
    split = dataclasses.replace(choice.split, fraction=best[1] / view.rows)
    return best[0], dataclasses.replace(choice, nbytes=best[0].nbytes, split=split)


def _divided(view: LayerView, choice: Choice, second_rows: int) -> PackedWeight:
    """The `second_rows` rows that count most by the split's method, the others by the first."""
    assert choice.split is not None
    loss = view.row_weight * torch.linalg.vector_norm(view.weight, dim=1, dtype=torch.float64).square()
    take = torch.zeros(view.rows, dtype=torch.bool)
    take[torch.argsort(loss, descending=True, stable=True)[:second_rows]] = True
    plans = ((choice.method, choice.options, ~take), (choice.split.method, choice.split.options, take))
    return Split.from_parts(
        take, *(compressor(m).compress(_rows_of(view, rows), **options) for m, options, rows in plans)
    )


def _rows_of(view: LayerView, rows: Tensor) -> LayerView:
    kept = None if view.kept is None else view.kept[rows]
    return dataclasses.replace(view, weight=view.weight[rows].contiguous(), row_weight=view.row_weight[rows], kept=kept)


def is_adjustable(method: str) -> bool:
    """Whether the method has a knob that reaches any size."""
    return type(compressor(method)).fit is not Compressor.fit
