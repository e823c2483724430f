"""GPTQ: quantise a weight column by column, each column's error corrected by the columns still to come.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323.

Columns are rounded one by one, each error corrected by the columns still to come (error_feedback.py). As in the
paper: damping (a share of the mean diagonal is added), columns in blocks of 128, dead inputs (H_jj = 0) set to zero.
As in the released code: `order` takes columns by falling H_jj ("act-order"), with the grid of every group fixed
beforehand from the original weight, so that a group stays a run of adjacent columns in the file. Departure: a group's
grid is the one that minimises the H_jj-weighted rounding error instead of min-max.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..formats import Integer, PackedWeight
from ..registry import register
from .contract import Candidate, Compressor, LayerView
from .error_feedback import Factor, by_group, feedback
from .grid import layer_grid

#: Values of the weight that go through the column loop together.
_CHUNK_VALUES = 1 << 22


@register(
    "gptq",
    acts_on="compress",
    paper="2210.17323",
    description="groupwise integers with second-order error feedback",
    combines_with=("recover",),
)
class GPTQ(Compressor):
    """Options: bits 2..8, group (columns a group, 0 = whole row), order (act-order), damping."""

    name = "gptq"

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        groups = [64] if layer.cols >= 96 else [0]
        return [{"bits": bits, "group": group} for group in groups for bits in (2, 3, 4, 5, 6, 8)]

    def candidates(self, layer: LayerView) -> Iterator[Candidate]:
        factors = list(by_group(layer, 0.01, True))
        for options in self.offers(layer):
            yield self.candidate(layer, options, self._compress(layer, factors, **options))

    def compress(
        self, layer: LayerView, *, bits: int, group: int = 64, order: bool = True, damping: float = 0.01
    ) -> PackedWeight:
        return self._compress(layer, list(by_group(layer, damping, order)), bits=bits, group=group)

    def _compress(
        self, layer: LayerView, factors: list[tuple[slice, Factor]], *, bits: int, group: int
    ) -> PackedWeight:
        scale, minimum = layer_grid(layer, bits, group, symmetric=False)
        assert minimum is not None
        codes = torch.empty(layer.weight.shape, dtype=torch.int16)
        width = group or layer.cols
        top = 2**bits - 1
        for rows, factor in factors:
            count = rows.stop - rows.start
            step = max(1, _CHUNK_VALUES // layer.cols)
            for first in range(0, count, step):
                part = slice(rows.start + first, rows.start + min(first + step, count))

                def quantise(column: int, values: Tensor, part: slice = part) -> Tensor:
                    s, m = scale[part, column // width], minimum[part, column // width]
                    code = torch.where(s > 0, (values - m) / s, torch.zeros(())).round_().clamp_(0, top)
                    codes[part, column] = code.to(torch.int16)
                    return code * s + m

                feedback(layer.weight[part], factor, quantise)
        return Integer.from_codes(codes, scale, minimum, bits=bits, group=group)
