"""Keep a weight in half precision: every layer's richest candidate, and the only one if data never reach it.

Zeros of a pruned weight are kept under a mask, where that holds the same values in fewer bytes.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..formats import Dense16, PackedWeight, Sparse
from ..registry import register
from .contract import Compressor, LayerView

_LARGEST_FLOAT16 = 65504.0
#: With fewer zeros a mask does not pay: it costs more than the zeros do among range-coded halves.
_LEAST_ZEROS = 0.02


def may_be_sparse(weight: Tensor) -> bool:
    """Whether a weight has enough exact zeros for a mask to be worth a try."""
    return int((weight == 0).sum()) >= max(1, _LEAST_ZEROS * weight.numel())


def half_precision(weight: Tensor, dtype: Literal["float16", "bfloat16"] = "float16") -> Dense16 | Sparse:
    """weight [rows, cols] rounded to 16 bits, as `dense16` or `sparse`, whichever is smaller.

    Raises `WeightError` if it is not finite or beyond the range of float16.
    """
    dense = Dense16.encode(weight, dtype)
    if dtype != "float16" or not may_be_sparse(dense.halves):
        return dense
    sparse = Sparse.encode(dense.decode(), dense.halves != 0)
    return sparse if sparse.nbytes < dense.nbytes else dense


@register("dense", acts_on="compress", description="half precision, no compression")
class Dense(Compressor):
    """Options: dtype, "float16" (default) or "bfloat16" (for weights beyond float16's range)."""

    name = "dense"
    keeps_zeros = True

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        fits = float(layer.weight.abs().max()) <= _LARGEST_FLOAT16
        return [{"dtype": "float16" if fits else "bfloat16"}]

    def compress(self, layer: LayerView, *, dtype: Literal["float16", "bfloat16"] = "float16") -> PackedWeight:
        return half_precision(layer.weight, dtype)
