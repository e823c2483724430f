"""Bi-Real Net: a piecewise quadratic in place of the sign (arXiv 1808.00278); also ReActNet's (2003.03488).

forward         sign(x)
backward        max(0, 2 - 2 |x|)
approximation   2 x - x |x| inside [-1, 1], -1 and +1 beyond
"""

from __future__ import annotations

from torch import Tensor

from ..registry import register
from .base import Estimator


@register(
    "bi-real",
    acts_on="estimators",
    paper="1808.00278",
    description="sign; triangular slope of a quadratic (Bi-Real, ReActNet, activations of ReCU and BiPer)",
)
class BiReal(Estimator):
    """sign(x) with the triangle 2 - 2 |x| inside [-1, 1] as slope; its integral is 2, the jump of the sign."""

    def surrogate(self, x: Tensor) -> Tensor:
        return (2 - 2 * x.abs()).clamp_min(0)

    def approximation(self, x: Tensor) -> Tensor:
        inside = x.clamp(-1, 1)
        return inside * (2 - inside.abs())
