"""PokeBNN: A Binary Pursuit of Lightweight Accuracy, arXiv 2112.00133: the sign with a clipping bound.

The paper's quantiser has the levels +-B/2 and the slope 1 inside its bound B. Per unit of output (the levels divided by
B/2, which is the scale a weight or layer part multiplies with) that is, with eps = 2^-7:

    forward         sign(x)                                     paper: (floor(clip(x/B, -(1-eps), 1-eps)) + 1/2) B
    backward        2/B 1[|x| < (1 - eps) B]                    paper: 1[|x| < (1 - eps) B]
    approximation   2/B clamp(x, -(1-eps) B, (1-eps) B)

The approximation rises by 4 (1 - eps), twice the jump of the sign: the paper's levels are half its bound.
B = 3 for activations; for weights the largest magnitude of each output channel (axis 0), without a gradient through it:
then only weights within 1/128 of their channel's maximum get none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import PlanError
from ..registry import register
from .base import Estimator

EDGE = 1 - 2.0**-7
SMALLEST_BOUND = 2.0**-23  # of a channel of zeros; in 16-bit floats the smallest normal number, so that 2/B is finite


@register(
    "pokebnn",
    acts_on="estimators",
    paper="2112.00133",
    description="sign; constant slope inside a clipping bound, fixed or the channel's maximum (PokeBNN)",
)
class ClippedBound(Estimator):
    """sign(x) with slope 2/B inside the bound B: a positive number, or "channel", the maximum of |x| along axis 0."""

    def __init__(self, bound: float | Literal["channel"] = 3.0) -> None:
        super().__init__()
        if bound != "channel" and (isinstance(bound, str) or not bound > 0):
            raise PlanError(f"estimator 'pokebnn': bound is {bound!r}; give a positive number or 'channel'")
        self.bound = bound

    def bound_of(self, x: Tensor) -> Tensor:
        """B, broadcastable against x, without gradient."""
        if isinstance(self.bound, str):
            size, inner = x.detach().abs(), tuple(range(1, x.ndim))
            peak = size.amax(inner, keepdim=True) if inner else size
            return peak.clamp_min(max(SMALLEST_BOUND, torch.finfo(x.dtype).tiny))
        return torch.as_tensor(self.bound, dtype=x.dtype, device=x.device)

    def surrogate(self, x: Tensor) -> Tensor:
        bound = self.bound_of(x)
        return (x.abs() < EDGE * bound) * (2 / bound)

    def approximation(self, x: Tensor) -> Tensor:
        bound = self.bound_of(x)
        return 2 / bound * torch.minimum(torch.maximum(x, -EDGE * bound), EDGE * bound)

    def extra_repr(self) -> str:
        return f"bound={self.bound!r}"
