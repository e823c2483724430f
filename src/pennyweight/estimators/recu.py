"""ReCU: Reviving the Dead Weights in Binary Neural Networks, arXiv 2103.12369: the gradient rule of its weights.

Weights beyond the tau-quantile of a Laplace distribution are clamped to it, then signed; the clamp does not change a
sign, so all it does is to stop the gradient of the outliers:

    tau  = 0.85 + 0.14 (e^progress - 1) / (e - 1)         0.85 to 0.99
    Q    = -mean |x| ln(2 - 2 tau)                        mean over the whole tensor, held fixed in the backward
    forward         sign(x)
    backward        1[|x| <= Q]
    approximation   clamp(x, -Q, Q)

x is meant to be the weight as the ReCU binariser standardises it. With tau below 1/2, Q would be negative: refused.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import PlanError
from ..registry import register
from .base import Estimator


@register(
    "recu",
    acts_on="estimators",
    paper="2103.12369",
    description="sign of weights; no gradient for outliers beyond an annealed Laplace quantile (ReCU)",
)
class RectifiedClamp(Estimator):
    """sign(x) with slope 1 up to Q, the annealed quantile of the whole tensor's magnitudes, and 0 beyond it."""

    def __init__(self, start: float = 0.85, end: float = 0.99) -> None:
        super().__init__()
        if not 0.5 < start <= end < 1:
            raise PlanError(f"estimator 'recu': tau goes from {start} to {end}; it must lie in (0.5, 1) and not fall")
        self.start, self.end = start, end

    def quantile(self, x: Tensor) -> Tensor:
        """Q of the tensor x at the current `progress`: a scalar without gradient."""
        tau = self.start + (self.end - self.start) * self.progress.expm1() / math.expm1(1)
        return -x.detach().abs().mean() * (2 - 2 * tau).log().to(x.dtype)

    def surrogate(self, x: Tensor) -> Tensor:
        return (x.abs() <= self.quantile(x)).to(x.dtype)

    def approximation(self, x: Tensor) -> Tensor:
        q = self.quantile(x)
        return x.clamp(-q, q)

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}"
