"""BiPer: Binary Neural Networks using a Periodic Function, arXiv 2404.01278.

    forward         sign(sin(omega x))      a square wave of period 2 pi / omega: its step is the sign of the sine
    backward        omega cos(omega x)      may be negative: past a crest the nearest edge lies the other way
    approximation   sin(omega x)            what the paper's first stage trains with, activations already binary

The sign itself is passed straight through without a window, as |sin| <= 1. omega and the size of x are one degree of
freedom; keep |omega x| below 1e3 in float32. A clip on the latent weights or weight averaging has no meaning here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PlanError
from ..registry import register
from .base import Estimator, sign


@register(
    "biper",
    acts_on="estimators",
    paper="2404.01278",
    description="sign of a sine of the weight; slope of the sine, so no weight is far from a flip (BiPer)",
)
class PeriodicSine(Estimator):
    """sign(sin(omega x)) with the slope omega cos(omega x). omega: radians per unit of x, positive (`PlanError`)."""

    def __init__(self, omega: float = 20.0) -> None:
        super().__init__()
        if not omega > 0:
            raise PlanError(f"estimator 'biper': omega is {omega}; it must be positive")
        self.omega = omega

    def exact(self, x: Tensor) -> Tensor:
        return sign(self.approximation(x))

    def surrogate(self, x: Tensor) -> Tensor:
        return self.omega * torch.cos(self.omega * x)

    def approximation(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * x)

    def extra_repr(self) -> str:
        return f"omega={self.omega}"
