"""Parts of p-norm weight decay (p_norm_decay.py): its division, its keys in the groups, and the loop over pieces.

The loop updates a piece of a weight and divides it while it is in the cache, for optimizers of which torch has a fused
kernel on the CPU.
"""

# The foreach and fused functions have no public names.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import PlanError

#: The exponent p: a number, or points (step, p) with straight lines between them and constants beyond.
Exponent = float | Sequence[Sequence[float]]

#: Elements that the fused loops work on at a time for each thread, so that all passes but the first find them in cache.
_PIECE = 1 << 17


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
        self.acts = group[key] > 0 and (isinstance(self.strength, Tensor) or self.strength > 0)
        self.zero_below = group["zero_below"] if self.p < 2 else 0.0
        self.min_dims = group["min_dims"]

    def decays(self, parameter: Tensor) -> bool:
        return self.acts and parameter.ndim >= self.min_dims

    def divisors(self, weights: Sequence[Tensor]) -> Sequence[Tensor | float]:
        if self.p == 2:
            return [1.0 + self.strength] * len(weights)
        halves = (torch.float16, torch.bfloat16)
        wide = [w.float() if w.dtype in halves else w for w in map(_local, weights)]
        return divisors_(torch._foreach_abs(wide), self.p, self.strength) if wide else []

    def divide_(self, weights: Sequence[Tensor], divisors: Sequence[Tensor | float]) -> None:
        for weight, divisor in zip(map(_local, weights), divisors):
            weight.div_(divisor)
            if self.zero_below > 0:
                torch.ops.aten.hardshrink.out(weight, self.zero_below, out=weight)


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of it; all here is elementwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def group_defaults(p: Exponent, ramp: int, zero_below: float, min_dims: int) -> dict[str, Any]:
    values = [p] if isinstance(p, int | float) else [value for _, value in p]
    steps = [] if isinstance(p, int | float) else [at for at, _ in p]
    if not values or not all(0 < value < math.inf for value in values):
        raise PlanError(f"pwd: p is {p}; give a positive number, or points [[step, p], ...] with positive p")
    if any(left >= right for left, right in itertools.pairwise(steps)):
        raise PlanError(f"pwd: the points of p are at steps {steps}; they must rise")
    if ramp < 0 or zero_below < 0:
        raise PlanError(f"pwd: ramp {ramp} and zero_below {zero_below} must not be negative")
    return {"p": p, "ramp": ramp, "zero_below": zero_below, "min_dims": min_dims, "decay_step": 0}


def count_step(group: dict[str, Any]) -> None:
    """A step was taken. Only where something depends on it: compiled steps are compiled anew for every number."""
    if group["ramp"] or not isinstance(group["p"], int | float):
        group["decay_step"] += 1


def can_loop(tensors: Sequence[Tensor]) -> bool:
    """Whether the fused loop can work on these: dense, on the CPU, in one order of elements, and not being compiled."""
    return not torch.compiler.is_compiling() and all(
        t.device.type == "cpu"
        and t.dtype == torch.float32
        and t.is_contiguous()
        and not t.is_sparse
        and not isinstance(t, DTensor)
        for t in tensors
    )


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = _PIECE * torch.get_num_threads()
    return zip(*(t.detach().view(-1).split(size) for t in tensors))


def fused_loop(
    weights: Sequence[Tensor], others: Sequence[Sequence[Tensor]], decay: Decay, update: Callable[..., None]
) -> None:
    """update(index, weight, *others) on pieces that fit the cache, each divided while it is still there."""
    largest = max((w.numel() for w in weights), default=0)
    buffer = torch.empty(min(largest, _PIECE * torch.get_num_threads()))
    for index, tensors in enumerate(zip(weights, *others)):
        if not decay.decays(tensors[0]):
            update(index, *tensors)
            continue
        for piece, *rest in _pieces(*tensors):
            divisor: Tensor | float = 1.0 + decay.strength
            if decay.p != 2:
                (divisor,) = divisors_([torch.abs(piece, out=buffer[: len(piece)])], decay.p, decay.strength)
            update(index, piece, *rest)
            decay.divide_([piece], [divisor])


def add_defaults(optimizer: Optimizer, defaults: dict[str, Any]) -> None:
    optimizer.defaults.update(defaults)
    for group in optimizer.param_groups:
        for key, value in defaults.items():
            group.setdefault(key, value)


def evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
