"""LSQ: weights on a grid whose step is learned (Learned Step Size Quantization, arXiv 1902.08153).

    c  = round(clamp(W / a, -n, n - 1)),   n = 2^(b-1)
    Wq = c a
    dL/dW = dL/dWq                         where -n <= W / a <= n - 1, else 0
    dL/da = g sum dL/dWq (c - W / a)       inside; outside the bracket is the end of the range, -n or n - 1
    g     = 1 / sqrt((n - 1) count)        count: weights that share the step
    a     = 2 mean |W| / sqrt(n - 1)       at the start

The paper has one step a layer; per="output" gives each output its own. The step's sign has no meaning: its magnitude is
used, so that a large update cannot turn the grid over. One bit has no straight-through path in this form (the grid
would be -a and 0), so it begins at two; below, see the binarisers, StatsQ and denoise-affine.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import PlanError, WeightError
from ..estimators import make_estimator, through
from ..formats import Integer, PackedWeight
from ..registry import register
from .base import WeightTransform, per_output, require_finite


@register("lsq", acts_on="weights", paper="1902.08153", description="2 to 8 bits, the step learned by gradient")
class LearnedStep(WeightTransform):
    """Weights at whole multiples of a learned step, [-2^(bits-1), 2^(bits-1) - 1] of it.

    per: "layer" or "output", what shares a step. Raises `PlanError` on other values, or unless bits is 2 to 8.
    """

    discrete: ClassVar[bool] = True
    step: nn.Parameter | None

    def __init__(self, bits: int = 4, per: Literal["layer", "output"] = "layer") -> None:
        super().__init__()
        if bits not in range(2, 9):
            raise PlanError(f"lsq: bits is {bits}; choose 2 to 8 (for one bit a binariser, statsq or denoise-affine)")
        if per not in ("layer", "output"):
            raise PlanError(f"lsq: per is {per!r}; choose 'layer' or 'output'")
        self.bits, self.per = bits, per
        self.round = make_estimator("round")
        self.register_parameter("step", None)

    @property
    def ends(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def fit(self, weight: Tensor) -> None:
        """Make the step, [outputs] or [1]. Raises `WeightError` if the weight is not finite or all of it zero."""
        require_finite(weight)
        rows = weight.detach().abs().flatten(1)
        mean = rows.mean(1) if self.per == "output" else rows.mean().view(1)
        if not bool(mean.any()):
            raise WeightError("all weights are zero, so that no step fits them; initialise or exclude the layer")
        # A row of zeros starts from the layer's step.
        mean = torch.where(mean > 0, mean, rows.mean())
        self.step = nn.Parameter(2 * mean / math.sqrt(self.ends[1]))

    def step_of(self, weight: Tensor) -> Tensor:
        """|a| of each output, [outputs], with the scaled gradient."""
        if self.step is None:
            raise WeightError("lsq: the step is not set; call fit(weight) first, as prepare does")
        count = weight.numel() / self.step.numel()
        g = 1 / math.sqrt(self.ends[1] * count)
        step = through(self.step, self.step.clone(), self.step.new_tensor(g)).abs()
        return step.clamp_min(torch.finfo(weight.dtype).tiny).to(weight.dtype).expand(len(weight))

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(c, step [outputs])."""
        step = self.step_of(weight)
        return self.round((weight / per_output(step, weight)).clamp(*self.ends)), step

    def forward(self, weight: Tensor) -> Tensor:
        codes, step = self.factors(weight)
        return codes * per_output(step, weight)

    @torch.no_grad()
    def boundary_distance(self, weight: Tensor) -> Tensor:
        """Distance of each weight from the nearest boundary between two codes, in steps; shape of the weight."""
        lowest, highest = self.ends
        scaled = weight / per_output(self.step_of(weight), weight)
        return (scaled - (scaled.floor() + 0.5).clamp(lowest + 0.5, highest - 0.5)).abs()

    def packed(self, weight: Tensor) -> PackedWeight:
        """The codes c, bit for bit, with scale 1; `WeightError` if the weight is not finite."""
        require_finite(weight)
        codes = self.factors(weight)[0].detach().flatten(1)
        return Integer.from_codes(codes.int(), codes.new_ones(len(codes), 1), bits=self.bits, group=0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per={self.per!r}"
