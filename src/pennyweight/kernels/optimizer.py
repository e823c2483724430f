"""Steps of optimizers with weight decay for any p norm, on the CPU: each number is read and written once.

An update takes a weight w to w', and the decay that to w' / (1 + strength * |w|^(p - 2)), or to zero where that is at
most `zero_below`. The power is right to rounding at p = 1/2, 1, 3/2 and 2; elsewhere its relative error is below
`POWER_ERROR`, and |w| < 2^-63 counts as zero. Weights are meant to be far below 2^63, and gradients of Adam below 1e20:
where their mean square is infinite, the weight becomes NaN. A result depends neither on the number of threads nor on
the size and order of the weights. The same in plain torch is in optim/p_norm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import _cpu, tell_once  # pyright: ignore[reportAttributeAccessIssue]

#: Of |w|^(p - 2): relative.
POWER_ERROR = 2.0**-15
LARGEST_P = 4.0


def reason_against(tensors: Sequence[Tensor], p: float) -> str | None:
    """Why these kernels cannot work on them; None if they can."""
    if _cpu is None:
        return "the compiled kernels are missing"
    if p > LARGEST_P:
        return f"p is {p}, above {LARGEST_P}"
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"there is a {type(tensor).__name__}"
        if not tensor.is_cpu or tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            return f"there is a tensor of {tensor.dtype} on {tensor.device}, {tensor.layout}"
        if not tensor.is_contiguous():
            return "there is a tensor that is not contiguous"
    return None


def fits(tensors: Sequence[Tensor], p: float) -> bool:
    """Whether these kernels can work on them, here and now: a graph that torch.compile makes holds none of them."""
    if torch.compiler.is_compiling():
        return False
    if _cpu is None:
        tell_once()
    return reason_against(tensors, p) is None


class FusedDecay:
    """The decay of one step. p: 0 to 4. strength: not negative."""

    def __init__(self, p: float, strength: float, zero_below: float) -> None:
        self.zero_below = zero_below if zero_below > 0 else -1.0
        self._decay = _cpu.Decay(p, strength, self.zero_below)

    def adam_step(
        self,
        lists: Sequence[Sequence[Tensor]],
        steps: Sequence[float],
        *,
        rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        maximize: bool,
    ) -> None:
        """A step of Adam and the decay, in place. lists: weights, gradients, means, squares, and for AMSGrad the
        largest squares. steps: from 1, for each weight."""
        weights, gradients, means, squares, *largest = map(_arrays, lists)
        _cpu.adam_step(
            *(weights, gradients, means, squares, *(largest or [[]]), list(steps)),
            *(rate, beta1, beta2, eps, maximize, self._decay, torch.get_num_threads()),
        )
        _changed(lists)

    def sgd_step(
        self,
        lists: Sequence[Sequence[Tensor]],
        *,
        rate: float,
        momentum: float,
        dampening: float,
        nesterov: bool,
        maximize: bool,
    ) -> None:
        """A step of SGD and the decay, in place. lists: weights, gradients, and if momentum is not 0 the momenta."""
        weights, gradients, *momenta = map(_arrays, lists)
        _cpu.sgd_step(
            *(weights, gradients, *(momenta or [[]]), rate, momentum, dampening, nesterov, maximize),
            *(self._decay, torch.get_num_threads()),
        )
        _changed(lists)

    def divisors(self, weight: Tensor) -> Tensor:
        """1 + strength * |w|^(p - 2), in the shape of the weight; infinite where a weight counts as zero and p < 2."""
        divisors = torch.empty_like(weight)
        _cpu.decay_divisors(*_arrays([weight, divisors]), self._decay, torch.get_num_threads())
        return divisors


def divide_(weight: Tensor, divisors: Tensor, zero_below: float) -> None:
    """weight /= divisors, and zero where that is at most `zero_below`, if this is positive."""
    zero_below = zero_below if zero_below > 0 else -1.0
    _cpu.divide(*_arrays([weight, divisors]), zero_below, torch.get_num_threads())
    increment_version(weight)


def _changed(lists: Sequence[Sequence[Tensor]]) -> None:
    """Tell autograd, which refuses to go back through numbers that are no longer there. Gradients (1) are as before."""
    for index, tensors in enumerate(lists):
        if index != 1:
            increment_version(tensors)


def _arrays(tensors: Sequence[Tensor]) -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]
