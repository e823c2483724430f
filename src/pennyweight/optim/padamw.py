"""PAdamW: Adam with weight decay for any p norm, in one pass over the weights on the CPU.

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
from torch.optim import AdamW
from torch.optim.adamw import adamw

from ..kernels import optimizer as kernel
from ..registry import register
from .p_norm import Decay, DecayedOptimizer, DecayOptions, divided, group_defaults


@register(
    "padamw",
    acts_on="optim",
    paper="2404.10824",
    description="Adam with decoupled weight decay for any p norm (pWD) in one pass",
)
class PAdamW(DecayedOptimizer, AdamW):
    """Adam with p-norm weight decay; `weight_decay` is the factor of sum |w|^p, the keywords p, ramp, zero_below and
    min_dims are those of `PNormDecay`, and the rest is as in AdamW.

    fused, one more keyword: None: where all is float32 on the CPU, contiguous, and p at most 4, a compiled kernel makes
    the whole step, and nothing is held beside AdamW's state. Elsewhere, under torch.compile, and with False, the passes
    are torch's (foreach on a GPU). True refuses weights that the kernel does not take. Raises PlanError, and ValueError
    for what AdamW refuses.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        **decay: Unpack[DecayOptions],
    ) -> None:
        own = group_defaults(**decay)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable
        )
        self._add_decay(own)

    def _step_group(self, group: dict[str, Any], decay: Decay) -> None:
        lists: list[list[Any]] = [[] for _ in range(6)]
        complex_ones = self._init_group(group, *lists)
        weights, gradients, means, squares, largest, steps = lists
        if not weights:
            return
        beta1, beta2 = map(float, group["betas"])
        fixed: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "maximize": group["maximize"]}
        plain: dict[str, Any] = {"amsgrad": group["amsgrad"], "weight_decay": 0.0}
        plain |= {"grad_scale": None, "found_inf": None}
        used = lists[:5] if group["amsgrad"] else lists[:4]
        if decay.by_kernel and kernel.fits([*itertools.chain(*used)], decay.p):
            torch._foreach_add_(steps, 1.0)
            rate = float(group["lr"])
            (counts, *decaying), (free_counts, *free) = divided(decay, weights, steps, *used)
            if counts:
                decay.fused().adam_step(decaying, [float(count) for count in counts], rate=rate, **fixed)
            if free_counts:
                maxima = free[4] if group["amsgrad"] else []
                w, g, mean, square = free[:4]
                torch._fused_adamw_(w, g, mean, square, maxima, free_counts, lr=rate, **fixed, **plain)
            return
        decayed = [w for w in weights if decay.decays(w)]
        divisors = decay.divisors(decayed)
        how: dict[str, Any] = {"foreach": group["foreach"], "capturable": group["capturable"]}
        how |= {"has_complex": complex_ones, "lr": group["lr"]}
        adamw(weights, gradients, means, squares, largest, steps, **how, **fixed, **plain)
        decay.divide_(decayed, divisors)
