"""FDA: Frequency Domain Approximation for Binary Neural Networks, arXiv 2103.00841: the gradient (the noise is apart).

The sign as a square wave of period 2 pi / omega, its Fourier series cut after n + 1 terms, u = omega x:

    n    = 9 + min(floor(9 progress), 8)                                       9 to 17, as in the last epoch of the code
    forward         sign(x)
    backward        4 omega / pi  sum_{i=0..n} cos((2i+1) u)  1[|x| <= 1]
                  = 4 omega / pi  sin(2(n+1) u) / (2 sin u)   1[|x| <= 1]      (n + 1 in place of the fraction at u = 0)
    approximation   4 / pi  sum_{i=0..n} sin((2i+1) u) / (2i+1)                of x clamped to [-1, 1]

Late in training the slope is negative near |x| = 1 (beyond 0.8727 at n = 17, omega = 0.1): the ripple of the series.
The closed form replaces the code's n + 1 cosines an element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import PlanError
from ..registry import register
from .base import Estimator


@register(
    "fda",
    acts_on="estimators",
    paper="2103.00841",
    description="sign; slope of a growing Fourier series (FDA)",
)
class FourierSeries(Estimator):
    """sign(x) with the slope of the truncated Fourier series of a square wave inside [-1, 1].

    omega: base frequency in radians per unit of x, in (0, pi): the guard at 0 covers the only zero of sin u then.
    terms: n at the start; it doubles, less one, by the end.
    """

    def __init__(self, omega: float = 0.1, terms: int = 9) -> None:
        super().__init__()
        if not 0 < omega < math.pi or terms < 1:
            raise PlanError(f"estimator 'fda': omega {omega} must lie in (0, pi) and terms {terms} be positive")
        self.omega, self.terms = omega, terms

    def _last(self) -> Tensor:
        """n, a float32 scalar."""
        return self.terms + (self.terms * self.progress).floor().clamp_max(self.terms - 1)

    def surrogate(self, x: Tensor) -> Tensor:
        count, u = self._last() + 1, self.omega * x.clamp(-1, 1)
        series = torch.where(u == 0, count.to(x.dtype), torch.sin(2 * count * u) / (2 * torch.sin(u)))
        return torch.where(x.abs() <= 1, 4 * self.omega / math.pi * series, 0.0)

    def approximation(self, x: Tensor) -> Tensor:
        odd = torch.arange(1, 4 * self.terms, 2, device=x.device)
        weight = (odd <= 2 * self._last() + 1) / odd.to(x.dtype)
        return 4 / math.pi * (torch.sin(self.omega * x.clamp(-1, 1).unsqueeze(-1) * odd) * weight).sum(-1)

    def extra_repr(self) -> str:
        return f"omega={self.omega}, terms={self.terms}"
