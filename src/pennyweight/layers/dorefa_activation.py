"""DoReFa-Net's activations, arXiv 1606.06160, equation 11: n-bit numbers in [0, 1].

    forward    round(clamp(a, 0, 1) (2^n - 1)) / (2^n - 1)        half to even
    backward   1 where 0 <= a <= 1, else 0

One bit gives {0, 1}, as in the paper; BiBench's code has -1 and +1 there instead, which is the method `sign`.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import PlanError
from ..estimators import make_estimator
from ..registry import register
from .base import LayerTransform


@register("dorefa", acts_on="layers", paper="1606.06160", description="inputs of n bits in [0, 1] (DoReFa-Net)")
class DoReFaActivation(LayerTransform):
    """Any shape and floating type. bits: 1 to 16, else `PlanError`."""

    def __init__(self, bits: int = 2) -> None:
        super().__init__()
        if not 1 <= bits <= 16:
            raise PlanError(f"'dorefa' inputs have 1 to 16 bits, not {bits}")
        self.bits = bits
        self.round = make_estimator("round")

    def forward(self, x: Tensor) -> Tensor:
        levels = 2**self.bits - 1
        return self.round(x.clamp(0, 1) * levels) / levels

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
