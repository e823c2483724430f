"""PSGD: SGD with weight decay for any p norm, in one loop on the CPU.

Decoupled Weight Decay for Any p Norm, arXiv 2404.10824; formulas and deviations in p_norm_decay.py, which does the same
around any optimizer.
"""

# The foreach and fused functions have no public names.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.sgd import sgd

from ..registry import register
from .p_norm import Decay, Exponent, add_defaults, can_loop, count_step, evaluated, fused_loop, group_defaults


@register(
    "psgd",
    acts_on="optim",
    paper="2404.10824",
    description="SGD with decoupled weight decay for any p norm (pWD) in one loop",
)
class PSGD(SGD):
    """SGD with p-norm weight decay; `weight_decay` is the factor of sum |w|^p and, unlike SGD's, no part of the
    gradient. The rest as in `PAdamW`."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 1e-2,
        nesterov: bool = False,
        *,
        p: Exponent = 1.0,
        ramp: int = 0,
        zero_below: float = 1e-13,
        min_dims: int = 2,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool = True,
    ) -> None:
        own = {**group_defaults(p, ramp, zero_below, min_dims), "fused_loop": fused}
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach)
        add_defaults(self, own)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Returns the closure's value, if there is one."""
        loss = evaluated(closure)
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in range(3)]
            sparse = self._init_group(group, *lists)
            weights, gradients, buffers = lists
            decay = Decay(group, "weight_decay")
            fixed = {key: group[key] for key in ("momentum", "dampening", "nesterov", "maximize")}
            fixed |= {"weight_decay": 0.0, "grad_scale": None, "found_inf": None}
            moving = group["momentum"] != 0
            others = [gradients, buffers] if moving else [gradients]
            ready = all(tensor is not None for tensors in others for tensor in tensors)  # the first step makes them
            if group["fused_loop"] and not sparse and ready and can_loop(sum(others, weights)):
                rate = float(group["lr"])

                def update(index: int, *of: Tensor, rate=rate, fixed=fixed) -> None:
                    torch._fused_sgd_([of[0]], [of[1]], [*of[2:]], lr=rate, is_first_step=False, **fixed)

                fused_loop(weights, others, decay, update)
            else:
                decayed = [w for w in weights if decay.decays(w)]
                divisors = decay.divisors(decayed)
                sgd(*lists, has_sparse_grad=sparse, foreach=group["foreach"], lr=group["lr"], **fixed)
                if moving:
                    for weight, buffer in zip(weights, buffers):
                        self.state[weight]["momentum_buffer"] = buffer
                decay.divide_(decayed, divisors)
            count_step(group)
        return loss
