"""Straight-through estimator: the gradient of the identity, within a window or everywhere.

Estimating or Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432; windowed in Binarized Neural Networks,
arXiv 1602.02830, and used by XNOR-Net (1603.05279) and DoReFa-Net (1606.06160).

    name        forward     backward             approximation
    ste         sign(x)     1[|x| <= window]     clamp(x, -window, window)
    identity    sign(x)     1                    x
    round       round(x)    1                    x

At the usual window 1 the surrogate's integral over the real line is 2, the jump of the sign.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ..errors import PlanError
from ..registry import register
from .base import Estimator


@register(
    "ste",
    acts_on="estimators",
    paper="1602.02830",
    description="sign; the gradient passes where |x| <= 1 (BNN, XNOR-Net, DoReFa)",
)
class ClippedStraightThrough(Estimator):
    """sign(x) with slope 1 inside [-window, window] (both ends included) and 0 outside. `PlanError` if window <= 0."""

    def __init__(self, window: float = 1.0) -> None:
        super().__init__()
        if not window > 0:
            raise PlanError(f"estimator 'ste': window is {window}; it must be positive")
        self.window = window

    def surrogate(self, x: Tensor) -> Tensor:
        return (x.abs() <= self.window).to(x.dtype)

    def approximation(self, x: Tensor) -> Tensor:
        return x.clamp(-self.window, self.window)

    def extra_repr(self) -> str:
        return f"window={self.window}"


class _Identity(Estimator):
    def surrogate(self, x: Tensor) -> Tensor:
        return x.new_ones(()).expand_as(x)

    def approximation(self, x: Tensor) -> Tensor:
        return x


@register("identity", acts_on="estimators", paper="1308.3432", description="sign; the gradient passes everywhere")
class IdentityStraightThrough(_Identity):
    """sign(x) with slope 1 everywhere."""


@register("round", acts_on="estimators", paper="1308.3432", description="rounding; the gradient passes everywhere")
class RoundStraightThrough(_Identity):
    """round(x), half to even, with slope 1 everywhere."""

    step: ClassVar[Literal["sign", "round"]] = "round"
