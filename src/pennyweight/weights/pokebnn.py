"""PokeBNN's weights of more than one bit: symmetric codes up to the channel's largest magnitude.

PokeBNN: A Binary Pursuit of Lightweight Accuracy, arXiv 2112.00133 (gates at 4 bits, stem and head at 8). Row r of W
[outputs, ...], b bits, n = 2^(b-1) - 1:

    B  = max |W_r|                        recomputed at each step, without gradient
    c  = floor(n W / B + 1/2)             in -n .. n: no clipping takes place
    Wq = c B / n
    dL/dW = dL/dWq

The weights of one bit are `binary` with the estimator `pokebnn` and the scale "half-maximum". A row of zeros keeps a
bound of 2^-23, as in the released code.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import PlanError
from ..estimators import through
from ..formats import Integer, PackedWeight
from ..registry import register
from .base import WeightTransform, per_output, require_finite

SMALLEST_BOUND = 2.0**-23


@register(
    "pokebnn", acts_on="weights", paper="2112.00133", description="2 to 8 bits, the channel's maximum at the last code"
)
class MaximumQuantizer(WeightTransform):
    """Weights at c B / n, c in -n .. n. Raises `PlanError` unless bits is 2 to 8 (one bit is the method `binary`)."""

    discrete: ClassVar[bool] = True

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        if bits not in range(2, 9):
            raise PlanError(f"'pokebnn' weights have 2 to 8 bits, not {bits}; one bit is 'binary'")
        self.bits = bits

    def fit(self, weight: Tensor) -> None:
        require_finite(weight)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(c, B / n [outputs]); dc/dW = n / B."""
        most = (1 << self.bits - 1) - 1
        bound = weight.detach().abs().flatten(1).amax(1).clamp_min(SMALLEST_BOUND)
        steps = per_output(most / bound, weight)
        # A product with the reciprocal can exceed the last code by its own rounding.
        codes = (weight.detach() * steps + 0.5).floor().clamp(-most, most)
        return through(weight, codes, steps), bound / most

    def forward(self, weight: Tensor) -> Tensor:
        codes, step = self.factors(weight)
        return codes * per_output(step, weight)

    def packed(self, weight: Tensor) -> PackedWeight:
        """The codes, bit for bit, with scale 1; `WeightError` if the weight is not finite."""
        require_finite(weight)
        codes = self.factors(weight)[0].detach().flatten(1)
        return Integer.from_codes(codes.int(), torch.ones_like(codes[:, :1]), bits=self.bits, group=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
