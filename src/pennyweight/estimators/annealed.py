"""Annealed sigmoids: wide and gentle at the start of training, close to the sign at its end.

Forward and Backward Information Retention for Accurate Binary Neural Networks (IR-Net), arXiv 1909.10788, section 3.3
("error decay estimator"): the tanh family, its schedule and its gain. The arctan family keeps both; its tails are
heavier (slope ~ 1/x^2 instead of exponential), so weights far from 0 still learn late in training.

    t = start (end / start)^progress      sharpness, 0.1 to 10
    g = max(1/t, 1)                       gain: while t < 1 the slope at 0 stays 1

    name     forward    backward                       approximation
    tanh     sign(x)    g t (1 - tanh(t x)^2)          g tanh(t x)
    arctan   sign(x)    g t / (1 + (pi t x / 2)^2)     g 2/pi arctan(pi t x / 2)

For t >= 1 both approximations rise by 2 in all, the jump of the sign.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import PlanError
from ..registry import register
from .base import Estimator


class _Annealed(Estimator):
    def __init__(self, start: float = 0.1, end: float = 10.0) -> None:
        super().__init__()
        if not 0 < start <= end:
            raise PlanError(f"annealed estimator: sharpness goes from {start} to {end}; it must be positive and grow")
        self.start, self.end = start, end

    def _sharpness_and_gain(self) -> tuple[Tensor, Tensor]:
        t = self.start * (self.end / self.start) ** self.progress
        return t, (1 / t).clamp_min(1)

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}"


@register(
    "tanh", acts_on="estimators", paper="1909.10788", description="sign; slope of a tanh that sharpens (IR-Net, EDE)"
)
class AnnealedTanh(_Annealed):
    """sign(x) with the slope of g tanh(t x); t grows geometrically from `start` to `end` with `progress`."""

    def surrogate(self, x: Tensor) -> Tensor:
        t, gain = self._sharpness_and_gain()
        return gain * t * (1 - torch.tanh(t * x).square())

    def approximation(self, x: Tensor) -> Tensor:
        t, gain = self._sharpness_and_gain()
        return gain * torch.tanh(t * x)


@register("arctan", acts_on="estimators", description="sign; slope of an arctan that sharpens: as tanh, heavier tails")
class AnnealedArctan(_Annealed):
    """sign(x) with the slope of g 2/pi arctan(pi t x / 2); t grows geometrically from `start` to `end`."""

    def surrogate(self, x: Tensor) -> Tensor:
        t, gain = self._sharpness_and_gain()
        return gain * t / (1 + (math.pi / 2 * t * x).square())

    def approximation(self, x: Tensor) -> Tensor:
        t, gain = self._sharpness_and_gain()
        return gain * 2 / math.pi * torch.atan(math.pi / 2 * t * x)
