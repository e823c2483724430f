"""ReSTE: Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary Neural Networks
Training, arXiv 2308.06689.

    o    = 1 + (o_end - 1) (1 - cos(pi/2 progress))           1 (straight through) to o_end; larger is closer to sign
    approximation   f_o(x) = sign(x) |x|^(1/o), made finite at 0 and cut at t
    forward         sign(x)
    backward        0                          |x| > t
                    1/o |x|^((1-o)/o)          m < |x| <= t
                    m^(1/o - 1)                |x| <= m        the secant of f_o through 0 and m

Paper and code against each other: the code's plot of the backward pass clamps the analytic slope at m instead of taking
the secant (continuous, lower by the factor o): inner="clamp" with m=0.05. Default: what the code trains with.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import PlanError
from ..registry import register
from .base import Estimator


@register(
    "reste",
    acts_on="estimators",
    paper="2308.06689",
    description="sign; slope of a power function that goes from the identity towards the sign (ReSTE)",
)
class PowerFunction(Estimator):
    """sign(x) with the slope of |x|^(1/o), o rising with `progress` from 1 to `o_end`.

    o_end >= 1. t: no gradient beyond this magnitude. m: half-width of the window around 0 in which the slope is
    constant. inner: which constant, "secant" or "clamp". `PlanError` unless 0 < m < t and o_end >= 1.
    """

    def __init__(
        self, o_end: float = 3.0, t: float = 1.5, m: float = 0.1, inner: Literal["secant", "clamp"] = "secant"
    ) -> None:
        super().__init__()
        if o_end < 1 or not 0 < m < t:
            raise PlanError(f"estimator 'reste': o_end {o_end} must be at least 1, and 0 < m {m} < t {t}")
        if inner not in ("secant", "clamp"):
            raise PlanError(f"estimator 'reste': inner is {inner!r}; choose 'secant' or 'clamp'")
        self.o_end, self.t, self.m, self.inner = o_end, t, m, inner

    def power(self) -> Tensor:
        """o at the current `progress`, a float32 scalar."""
        return 1 + (self.o_end - 1) * (1 - torch.cos(math.pi / 2 * self.progress))

    def _inner_slope(self, o: Tensor) -> Tensor:
        secant = self.m ** (1 / o - 1)
        return secant if self.inner == "secant" else secant / o

    def surrogate(self, x: Tensor) -> Tensor:
        o, size = self.power(), x.abs()
        outer = size.clamp(self.m, self.t).log().mul((1 - o) / o).exp() / o  # the clamp keeps the pole at 0 away
        step = self._inner_slope(o) - self.m ** ((1 - o) / o) / o  # from there to the inner slope
        # Sums and products with 0 or 1: on a CPU several times quicker than `where`.
        return (outer + step.to(x.dtype) * (size <= self.m)) * (size <= self.t)

    def approximation(self, x: Tensor) -> Tensor:
        o, size = self.power(), x.abs().clamp_max(self.t)
        inner = self._inner_slope(o) * size.clamp_max(self.m)
        return x.sign() * (inner + size.clamp_min(self.m) ** (1 / o) - self.m ** (1 / o))

    def extra_repr(self) -> str:
        return f"o_end={self.o_end}, t={self.t}, m={self.m}, inner={self.inner!r}"
