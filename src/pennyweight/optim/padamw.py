"""PAdamW: Adam with weight decay for any p norm, in one loop on the CPU.

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
from torch.optim import AdamW
from torch.optim.adamw import adamw

from ..registry import register
from .p_norm import Decay, Exponent, add_defaults, can_loop, count_step, evaluated, fused_loop, group_defaults


@register(
    "padamw",
    acts_on="optim",
    paper="2404.10824",
    description="Adam with decoupled weight decay for any p norm (pWD) in one loop",
)
class PAdamW(AdamW):
    """Adam with p-norm weight decay; `weight_decay` is the factor of sum |w|^p, the rest as in `PNormDecay` and AdamW.

    fused: update and divide piece by piece where all is float32 on the CPU; the state is AdamW's, and nothing beside it
    is held. Elsewhere, and with fused=False, the passes are torch's (foreach on a GPU). Raises PlanError, and
    ValueError for what AdamW refuses.
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
        p: Exponent = 1.0,
        ramp: int = 0,
        zero_below: float = 1e-13,
        min_dims: int = 2,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool = True,
    ) -> None:
        own = {**group_defaults(p, ramp, zero_below, min_dims), "fused_loop": fused}
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable
        )
        add_defaults(self, own)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Returns the closure's value, if there is one."""
        loss = evaluated(closure)
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in range(6)]
            complex_ones = self._init_group(group, *lists)
            weights, gradients, means, squares, largest, steps = lists
            decay = Decay(group, "weight_decay")
            beta1, beta2 = group["betas"]
            fixed: dict[str, Any] = {
                "amsgrad": group["amsgrad"],
                "beta1": beta1,
                "beta2": beta2,
                "weight_decay": 0.0,
                "eps": group["eps"],
                "maximize": group["maximize"],
                "grad_scale": None,
                "found_inf": None,
            }
            if group["fused_loop"] and not complex_ones and can_loop([*weights, *gradients, *means, *squares]):
                torch._foreach_add_(steps, 1.0)
                rate = float(group["lr"])

                def update(index: int, *of: Tensor, steps=steps, rate=rate, fixed=fixed) -> None:
                    torch._fused_adamw_([of[0]], [of[1]], [of[2]], [of[3]], [*of[4:]], [steps[index]], lr=rate, **fixed)

                maxima = [largest] if group["amsgrad"] else []
                fused_loop(weights, [gradients, means, squares, *maxima], decay, update)
            else:
                decayed = [w for w in weights if decay.decays(w)]
                divisors = decay.divisors(decayed)
                adamw(
                    *lists,
                    foreach=group["foreach"],
                    capturable=group["capturable"],
                    has_complex=complex_ones,
                    lr=group["lr"],
                    **fixed,
                )
                decay.divide_(decayed, divisors)
            count_step(group)
        return loss
