"""LAMB: Adam's direction, scaled layer by layer to the norm of the weight, for large batches.

Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv 1904.00962, algorithm 2. With m and v
Adam's moments, for each weight tensor w:

    r = m_hat / (sqrt(v_hat) + eps) + weight_decay * w
    w <- w - lr * (phi(||w||) / ||r||) * r

phi(z) = min(z, max_norm), the identity at the default, infinity. The ratio is 1 where ||w|| or ||r|| is 0. The paper
scales every layer; groups with trust=False (biases, norm gains, as many users prefer) take Adam's plain step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import PlanError
from ..registry import register
from .closure import evaluated


@register("lamb", acts_on="optim", paper="1904.00962", description="Adam scaled to each weight's norm, large batches")
class LAMB(Optimizer):
    """Raises PlanError on options out of range."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        max_norm: float = math.inf,
        trust: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or max_norm <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise PlanError(
                f"lamb: lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative, max_norm {max_norm} "
                f"positive and betas {betas} within 0 to below 1"
            )
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "max_norm": max_norm, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Returns the closure's value, if there is one."""
        loss = evaluated(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(weight)
                    state["exp_avg_sq"] = torch.zeros_like(weight)
                state["step"] += 1
                step = float(state["step"])
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(weight.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
                root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
                direction = (mean / (1 - beta1**step)).div_(root).add_(weight, alpha=group["weight_decay"])
                if group["trust"]:
                    ratio = weight.norm().clamp(max=group["max_norm"]) / direction.norm()
                    direction.mul_(torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0))
                weight.add_(direction, alpha=-group["lr"])
        return loss
