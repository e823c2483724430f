"""DoReFa-Net's weights, arXiv 1606.06160, equations 7 to 9: n-bit numbers in [-1, 1] after a tanh.

    n >= 2     u = tanh(w) / (2 max |tanh(w)|) + 1/2                     max over the whole tensor
               forward   2 round(u (2^n - 1)) / (2^n - 1) - 1            half to even
               backward  the round passes the gradient; tanh and its maximum have their own
    n = 1      sign(w) mean |w|: `binary` with scale "layer"

The codes kept are the odd or even integers c = 2 round(u m) - m with m = 2^n - 1, and the scale is 1/m, so that the
stored weights multiply exactly as the trained ones do.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import PlanError, WeightError
from ..estimators import make_estimator
from ..formats import Integer, PackedWeight
from ..registry import register
from .base import WeightTransform, per_output, require_finite


@register("dorefa", acts_on="weights", paper="1606.06160", description="n-bit weights after a tanh (DoReFa-Net)")
class DoReFaWeight(WeightTransform):
    """bits: 2 to 8, else `PlanError` (one bit is the method `binary`)."""

    discrete: ClassVar[bool] = True

    def __init__(self, bits: int = 2) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise PlanError(f"'dorefa' weights have 2 to 8 bits, not {bits}; one bit is 'binary' with scale: layer")
        self.bits = bits
        self.round = make_estimator("round")

    def fit(self, weight: Tensor) -> None:
        """Raises `WeightError` if the weight is not finite, or all zero: then there is no maximum to divide by."""
        require_finite(weight)
        if not bool(weight.any()):
            raise WeightError("all weights are zero (zero variance); initialise the layer or exclude it")

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        most, squashed = 2**self.bits - 1, torch.tanh(weight)
        u = squashed / (2 * squashed.abs().max()) + 0.5
        return 2 * self.round(u * most) - most, weight.new_full((len(weight),), 1 / most)

    def forward(self, weight: Tensor) -> Tensor:
        codes, scale = self.factors(weight)
        return codes * per_output(scale, codes)

    def packed(self, weight: Tensor) -> PackedWeight:
        """Codes (c + m) / 2 with scale 2 and minimum -m, which float16 holds exactly."""
        require_finite(weight)
        codes, most = self.factors(weight)[0].detach().flatten(1), 2**self.bits - 1
        two = codes.new_full((len(codes), 1), 2.0)
        stored = ((codes + most) / 2).to(torch.int32)
        return Integer.from_codes(stored, two, two * (-most / 2), bits=self.bits, group=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
