"""Weight compander: every weight passes through a curve that is steep at zero and flat far out.

Weight Compander: A Simple Weight Reparameterization for Regularization, arXiv 2306.16993. v is the latent weight:

    arctan      w = a arctan(v / b)      |w| <= a pi/2    dw/dv = a b / (b^2 + v^2)        (default)
    tanh        w = a tanh(v / b)        |w| <= a         dw/dv = (a / b) (1 - tanh^2(v / b))
    softsign    w = a v / (b + |v|)      |w| <= a         dw/dv = a b / (b + |v|)^2

All are odd and increasing with slope a/b at 0. Of arctan, weights below the crossover a arctan(v*/b) = v* grow and
those above it shrink; a = b compresses only.

Unverified: the paper's formula and tables could not be read. Its abstract states one cheap function of each weight that
bounds it and pushes it away from zero, and shape parameters that may be learned. The curves, their defaults (a = 1.5,
b = 1 in units of the layer's root mean square weight), one pair (a, b) a layer and the start at the inverse curve are
our reading of that: hence `curve`, `units` and `learn`.

Near zero a step of gradient descent moves w (a/b)^2 times as far as without the curve: tune the learning rate anew. The
curve acts against sparsity: do not combine it with magnitude pruning or p < 1 weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PlanError, WeightError
from ..registry import register
from .base import WeightTransform, require_finite

Curve = Literal["arctan", "tanh", "softsign"]
Units = Literal["rms", "absolute"]
#: A learned a or b is at least so many units.
_FLOOR = 1e-3
#: Share of the bound that the inverse curve reaches: beyond it latent weights would be huge.
_REACH = 0.95


class _Curve(NamedTuple):
    """y = forward(x) for a = b = 1, its inverse for |y| < bound, and the bound."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    bound: float


CURVES: dict[str, _Curve] = {
    "arctan": _Curve(torch.atan, torch.tan, math.pi / 2),
    "tanh": _Curve(torch.tanh, torch.atanh, 1.0),
    "softsign": _Curve(F.softsign, lambda y: y / (1 - y.abs()), 1.0),
}


def compand(v: Tensor, a: Tensor | float, b: Tensor | float, curve: Curve = "arctan") -> Tensor:
    """The weights w of latent weights v, of the same shape; differentiable in v, a and b."""
    return a * CURVES[curve].forward(v / b)


def expand(w: Tensor, a: Tensor | float, b: Tensor | float, curve: Curve = "arctan") -> Tensor:
    """The latent weights of w, which is clamped to 0.95 of the bound first: `compand`'s inverse within that."""
    form = CURVES[curve]
    reach = _REACH * form.bound
    return b * form.inverse((w / a).clamp(-reach, reach))


@register(
    "weight-compander",
    acts_on="weights",
    paper="2306.16993",
    description="weights through a curve that bounds them and is steep at zero; chains before low-bit weights",
)
class WeightCompander(WeightTransform):
    """See the module. First of a chain it leaves the layer as it is, but for weights beyond 0.95 of the bound.

    a, b: height and width of the curve; units "rms" counts them in root mean squares of the layer's weight as it is
    fitted. learn: train a and b, kept positive; they are the parameter `shape` [2], which wants no weight decay and a
    learning rate 10 to 100 times below that of the weights. Raises `PlanError` for curves and units that do not exist
    and for a < b, which would shrink every weight.
    """

    unit: Tensor

    def __init__(
        self, a: float = 1.5, b: float = 1.0, curve: Curve = "arctan", units: Units = "rms", learn: bool = False
    ) -> None:
        super().__init__()
        if curve not in CURVES:
            raise PlanError(f"weight-compander: curve is {curve!r}; choose one of {', '.join(CURVES)}")
        if units not in ("rms", "absolute"):
            raise PlanError(f"weight-compander: units is {units!r}; choose 'rms' or 'absolute'")
        if not 0 < b <= a < math.inf:
            raise PlanError(f"weight-compander: a = {a:g}, b = {b:g}; a curve that expands near zero needs 0 < b <= a")
        if learn and b <= _FLOOR:
            raise PlanError(f"weight-compander: b = {b:g} cannot be learned; start above {_FLOOR:g}")
        self.a, self.b, self.units = float(a), float(b), units
        self.curve: Curve = curve
        self.register_buffer("unit", torch.ones(()))
        self.shape = nn.Parameter(_softplus_inverse(torch.tensor([a, b]) - _FLOOR)) if learn else None

    def fit(self, weight: Tensor) -> None:
        """Take the unit. Raises `WeightError` if the weight is not finite, or all zero where it gives the unit."""
        require_finite(weight)
        if self.units == "absolute":
            return
        unit = weight.detach().float().square().mean().sqrt()
        if not bool(unit > 0):
            raise WeightError("all weights are zero, and the curve is measured by them; initialise the layer first")
        self.unit.copy_(unit)

    def curve_shape(self) -> tuple[Tensor, Tensor]:
        """a and b as they are now, in the units of the weight."""
        if self.shape is None:
            return self.a * self.unit, self.b * self.unit
        a, b = self.unit * (F.softplus(self.shape) + _FLOOR)
        return a, b

    def forward(self, weight: Tensor) -> Tensor:
        a, b = (value.to(weight.dtype) for value in self.curve_shape())
        return compand(weight, a, b, self.curve)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The latent weights of `weight`, clamped to 0.95 of the bound. At least in float32: near it tan is steep."""
        a, b = self.curve_shape()
        wide = torch.promote_types(weight.dtype, torch.float32)
        return expand(weight.detach().to(wide), a.detach(), b.detach(), self.curve).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"a={self.a:g}, b={self.b:g}, curve={self.curve}, units={self.units}, learn={self.shape is not None}"


def _softplus_inverse(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
