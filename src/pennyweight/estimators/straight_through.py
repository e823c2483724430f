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

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import PlanError
from ..registry import register
from .base import Estimator


class _Windowed(torch.autograd.Function):
    """`value` in place of x; the gradient passes where -end < x < end, in one pass over the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, end: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.end = end
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], x, -ctx.end, ctx.end), None, None


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

    def cross(self, x: Tensor) -> Tensor:
        window = torch.tensor(self.window, dtype=x.dtype)
        end = torch.nextafter(window, torch.full_like(window, math.inf))  # the window includes its ends
        return _Windowed.apply(x, self.exact(x.detach()), end.item())

    def surrogate(self, x: Tensor) -> Tensor:
        return (x.abs() <= self.window).to(x.dtype)

    def approximation(self, x: Tensor) -> Tensor:
        return x.clamp(-self.window, self.window)

    def extra_repr(self) -> str:
        return f"window={self.window}"


class _Straight(torch.autograd.Function):
    """`value` in place of x; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Identity(Estimator):
    def cross(self, x: Tensor) -> Tensor:
        return _Straight.apply(x, self.exact(x.detach()))

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
