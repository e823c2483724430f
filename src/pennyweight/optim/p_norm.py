"""Parts of p-norm weight decay (p_norm_decay.py): its division, the keys in groups, what PAdamW and PSGD share."""

# The foreach functions have no public names.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import itertools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import PlanError
from ..kernels import optimizer as kernel
from .closure import evaluated

#: The exponent p: a number, or points (step, p) with straight lines between them and constants beyond.
Exponent = float | Sequence[Sequence[float]]


def exponent_at(p: Exponent, step: int) -> float:
    """The exponent in use at a step."""
    if isinstance(p, int | float):
        return float(p)
    points = [(float(at), float(value)) for at, value in p]
    for (left, first), (right, second) in itertools.pairwise(points):
        if left <= step < right:
            return first + (second - first) * (step - left) / (right - left)
    return points[0][1] if step < points[0][0] else points[-1][1]


@torch.no_grad()
def divisors_(magnitudes: Sequence[Tensor], p: float, strength: float | Tensor) -> Sequence[Tensor]:
    """1 + strength * |w|^(p - 2) in place of |w|; strength: p * lr * decay, positive."""
    magnitudes = list(magnitudes)
    if p in (1, 1.5, 3, 4):  # reciprocals, roots and products
        torch._foreach_pow_(magnitudes, p - 2)
    else:  # half of the time of pow, with a relative error around 1e-6 in float32
        torch._foreach_log2_(magnitudes)
        torch._foreach_mul_(magnitudes, p - 2)
        for magnitude in magnitudes:
            magnitude.exp2_()
    torch._foreach_mul_(magnitudes, strength)
    torch._foreach_add_(magnitudes, 1.0)
    return magnitudes


class Decay:
    """The decay of one group at one step."""

    def __init__(self, group: dict[str, Any], key: str) -> None:
        self.p = exponent_at(group["p"], group["decay_step"])
        share = min(1.0, group["decay_step"] / group["ramp"]) if group["ramp"] else 1.0
        self.strength = self.p * group["lr"] * group[key] * share
        if isinstance(self.strength, Tensor):  # never 0, so that 0 * inf stays out of it without a look at the device
            self.strength = self.strength.clamp_min(torch.finfo(torch.float32).tiny)
        self.acts = group[key] * share > 0 and (isinstance(self.strength, Tensor) or self.strength > 0)
        self.zero_below = group["zero_below"] if self.p < 2 else 0.0
        self.min_dims = group["min_dims"]
        self.by_kernel = group["fused_loop"] is not False

    def decays(self, parameter: Tensor) -> bool:
        return self.acts and parameter.ndim >= self.min_dims

    def fused(self) -> kernel.FusedDecay:
        """As the compiled kernels have it."""
        return kernel.FusedDecay(self.p, float(self.strength), self.zero_below)

    def divisors(self, weights: Sequence[Tensor]) -> Sequence[Tensor | float]:
        if self.p == 2:
            return [1.0 + self.strength] * len(weights)
        weights = [_local(w) for w in weights]
        if not weights:
            return []
        if self.by_kernel and kernel.fits(weights, self.p):
            fused = self.fused()
            return [fused.divisors(w) for w in weights]
        halves = (torch.float16, torch.bfloat16)
        wide = [w.float() if w.dtype in halves else w for w in weights]
        return divisors_(torch._foreach_abs(wide), self.p, self.strength)

    def divide_(self, weights: Sequence[Tensor], divisors: Sequence[Tensor | float]) -> None:
        for weight, divisor in zip(map(_local, weights), divisors):
            if (
                self.by_kernel
                and isinstance(divisor, Tensor)
                and divisor.ndim
                and kernel.fits([weight, divisor], self.p)
            ):
                kernel.divide_(weight, divisor, self.zero_below)
                continue
            weight.div_(divisor)
            if self.zero_below > 0:
                torch.ops.aten.hardshrink.out(weight, self.zero_below, out=weight)


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of it; all here is elementwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class DecayOptions(TypedDict, total=False):
    """Keywords of an optimizer with p-norm decay, as in `PNormDecay`."""

    p: Exponent
    ramp: int
    zero_below: float
    min_dims: int
    fused: bool | None


def group_defaults(
    p: Exponent = 1.0, ramp: int = 0, zero_below: float = 1e-13, min_dims: int = 2, fused: bool | None = None
) -> dict[str, Any]:
    """The keys of a group. Raises PlanError for values out of range."""
    values = [p] if isinstance(p, int | float) else [value for _, value in p]
    steps = [] if isinstance(p, int | float) else [at for at, _ in p]
    if not values or not all(0 < value < math.inf for value in values):
        raise PlanError(f"pwd: p is {p}; give a positive number, or points [[step, p], ...] with positive p")
    if any(left >= right for left, right in itertools.pairwise(steps)):
        raise PlanError(f"pwd: the points of p are at steps {steps}; they must rise")
    if ramp < 0 or zero_below < 0:
        raise PlanError(f"pwd: ramp {ramp} and zero_below {zero_below} must not be negative")
    own = {"p": p, "ramp": ramp, "zero_below": zero_below, "min_dims": min_dims}
    return {**own, "decay_step": 0, "fused_loop": fused}  # "fused" is torch's


def count_step(group: dict[str, Any]) -> None:
    """A step was taken. Only where something depends on it: compiled steps are compiled anew for every number."""
    if group["ramp"] or not isinstance(group["p"], int | float):
        group["decay_step"] += 1


class DecayedOptimizer(Optimizer, ABC):
    """What PAdamW and PSGD share: an optimizer of torch's whose `weight_decay` is the factor of sum |w|^p."""

    def _add_decay(self, own: dict[str, Any]) -> None:
        """own: of `group_defaults`. Raises PlanError where the kernels are demanded and cannot do it."""
        self.defaults.update(own)
        for group in self.param_groups:
            for key, value in own.items():
                group.setdefault(key, value)
            p = group["p"]
            largest = p if isinstance(p, int | float) else max(value for _, value in p)
            reason = kernel.reason_against(group["params"], largest) if group["fused_loop"] else None
            if reason:
                raise PlanError(f"{type(self).__name__}: fused=True is not possible, as {reason}; leave it at None")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Returns the closure's value, if there is one."""
        loss = evaluated(closure)
        for group in self.param_groups:
            self._step_group(group, Decay(group, "weight_decay"))
            count_step(group)
        return loss

    @abstractmethod
    def _step_group(self, group: dict[str, Any], decay: Decay) -> None:
        """The step of one group, with that decay."""


def divided(decay: Decay, weights: Sequence[Tensor], *lists: Sequence[Any]) -> tuple[list[list[Any]], list[list[Any]]]:
    """The lists of what belongs to the weights that decay, and those of what belongs to the others."""
    decays = [decay.decays(weight) for weight in weights]
    return (
        [list(itertools.compress(column, decays)) for column in lists],
        [list(itertools.compress(column, map(operator.not_, decays))) for column in lists],
    )
