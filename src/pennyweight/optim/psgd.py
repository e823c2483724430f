"""PSGD: SGD with weight decay for any p norm, in one pass over the weights on the CPU.

Decoupled Weight Decay for Any p Norm, arXiv 2404.10824; formulas and deviations in p_norm_decay.py, which does the same
around any optimizer.
"""

# The foreach and fused functions have no public names.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import itertools
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.sgd import sgd

from ..kernels import optimizer as kernel
from ..registry import register
from .p_norm import Decay, DecayedOptimizer, DecayOptions, divided, group_defaults


@register(
    "psgd",
    acts_on="optim",
    paper="2404.10824",
    description="SGD with decoupled weight decay for any p norm (pWD) in one pass",
)
class PSGD(DecayedOptimizer, SGD):
    """SGD with p-norm weight decay; `weight_decay` is the factor of sum |w|^p and, unlike SGD's, no part of the
    gradient. Keywords and what is raised as in `PAdamW`, the rest as in SGD."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 1e-2,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        **decay: Unpack[DecayOptions],
    ) -> None:
        own = group_defaults(**decay)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach)
        self._add_decay(own)

    def _step_group(self, group: dict[str, Any], decay: Decay) -> None:
        lists: list[list[Any]] = [[], [], []]
        weights, gradients, momenta = lists
        sparse = self._init_group(group, *lists)
        if not weights:
            return
        fixed: dict[str, Any] = {key: group[key] for key in ("momentum", "dampening", "nesterov", "maximize")}
        plain: dict[str, Any] = {"weight_decay": 0.0, "grad_scale": None, "found_inf": None}
        used = lists if group["momentum"] else lists[:2]
        if group["momentum"] and not sparse:
            for index, (weight, momentum) in enumerate(zip(weights, momenta)):
                if momentum is None:  # the first step takes all of the gradient, whatever the dampening
                    before = gradients[index] * ((-1) ** group["maximize"] * group["dampening"] / group["momentum"])
                    self.state[weight]["momentum_buffer"] = momenta[index] = before
        if decay.by_kernel and not sparse and kernel.fits([*itertools.chain(*used)], decay.p):
            rate = float(group["lr"])
            decaying, free = divided(decay, weights, *used)
            if decaying[0]:
                decay.fused().sgd_step(decaying, rate=rate, **fixed)
            if free[0]:
                torch._fused_sgd_(*free[:2], *(free[2:] or [[]]), lr=rate, is_first_step=False, **fixed, **plain)
            return
        decayed = [w for w in weights if decay.decays(w)]
        divisors = decay.divisors(decayed)
        sgd(weights, gradients, momenta, sparse, group["foreach"], lr=group["lr"], **fixed, **plain)
        if sparse and group["momentum"]:
            for weight, momentum in zip(weights, momenta):
                self.state[weight]["momentum_buffer"] = momentum
        decay.divide_(decayed, divisors)
