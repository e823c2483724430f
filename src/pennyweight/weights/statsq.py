"""StatsQ: weights on a grid whose step follows from their own mean magnitude.

Oscillation-free Quantization for Low-bit Vision Transformers (OFQ), arXiv 2302.02210, section on statistical weight
quantization. Row r of W [outputs, ...], b bits, n = 2^(b-1):

    s  = 2 mean |W_r|                             without gradient: nothing is learned, nothing can oscillate with it
    c  = round(clamp(n W / s - 1/2, -n, n - 1))   half to even
    Wq = (c + 1/2) s / n                          2^b levels, none of them 0
    dL/dW = dL/dWq                                identity, for clamped entries too

Departures. The code clips W / s to [-1, 1 - 1e-6] and rounds then; the clamp gives the same codes, except at one bit:
the code's reach a third level there, here Wq = mean |W_r| sign(W). A row of zeros keeps a step of the smallest normal
number, so that it can learn. All axes but the first belong to the row; of 3-D weights the code's
rows are those of the middle axis.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import PlanError
from ..estimators import make_estimator, through
from ..formats import Binary, Integer, PackedWeight
from ..registry import register
from .base import WeightTransform, per_output, require_finite


def statistical_step(weight: Tensor, bits: int) -> Tensor:
    """s / n of each output, [outputs], without gradient and positive."""
    mean = weight.detach().abs().flatten(1).mean(1)
    return (mean * 2.0 ** (2 - bits)).clamp_min(torch.finfo(weight.dtype).tiny)


@register(
    "statsq", acts_on="weights", paper="2302.02210", description="1 to 8 bits, step from the row's mean magnitude"
)
class StatisticalQuantizer(WeightTransform):
    """Weights at (c + 1/2) steps, c in [-2^(bits-1), 2^(bits-1) - 1]. Raises `PlanError` unless bits is 1 to 8."""

    discrete: ClassVar[bool] = True

    def __init__(self, bits: int = 2) -> None:
        super().__init__()
        if bits not in range(1, 9):
            raise PlanError(f"statsq: bits is {bits}; choose 1 to 8")
        self.bits = bits
        self.round = make_estimator("round")

    def fit(self, weight: Tensor) -> None:
        require_finite(weight)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(c + 1/2, step [outputs])."""
        step = statistical_step(weight, self.bits)
        scaled = weight / per_output(step, weight)
        n = 1 << self.bits - 1
        return self.round(through(scaled, (scaled - 0.5).clamp(-n, n - 1), scaled.new_ones(()))) + 0.5, step

    def forward(self, weight: Tensor) -> Tensor:
        levels, step = self.factors(weight)
        return through(weight, levels * per_output(step, weight), weight.new_ones(()))

    def boundary_distance(self, weight: Tensor) -> Tensor:
        """Distance of each weight from the nearest boundary between two levels, in steps; shape of the weight."""
        last = (1 << self.bits - 1) - 1
        scaled = weight.detach() / per_output(statistical_step(weight, self.bits), weight)
        return (scaled - scaled.round().clamp(-last, last)).abs()

    def packed(self, weight: Tensor) -> PackedWeight:
        """The c + 1/2 (at one bit their signs, halved), bit for bit; `WeightError` if the weight is not finite."""
        require_finite(weight)
        levels = self.factors(weight)[0].detach().flatten(1)
        ones = levels.new_ones(len(levels), 1)
        if self.bits == 1:
            return Binary.from_signs(levels >= 0, ones / 2, 0)
        lowest = 0.5 - (1 << self.bits - 1)
        return Integer.from_codes((levels - lowest).int(), ones, ones * lowest, bits=self.bits, group=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
