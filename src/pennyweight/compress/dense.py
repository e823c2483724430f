"""Keep a weight in half precision: every layer's richest candidate, and the only one if data never reach it."""

from __future__ import annotations

from typing import Any, Literal

from ..formats import Dense16, PackedWeight
from ..registry import register
from .contract import Compressor, LayerView

_LARGEST_FLOAT16 = 65504.0


@register("dense", acts_on="compress", description="half precision, no compression")
class Dense(Compressor):
    """Options: dtype, "float16" (default) or "bfloat16" (for weights beyond float16's range)."""

    name = "dense"

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        fits = float(layer.weight.abs().max()) <= _LARGEST_FLOAT16
        return [{"dtype": "float16" if fits else "bfloat16"}]

    def compress(self, layer: LayerView, *, dtype: Literal["float16", "bfloat16"] = "float16") -> PackedWeight:
        return Dense16.encode(layer.weight, dtype=dtype)
