"""pWD: weight decay for any p norm, a division after the step, so that p <= 1 makes weights exactly zero.

Decoupled Weight Decay for Any p Norm, arXiv 2404.10824. With w_hat the weight after the inner optimizer's step, which
sees nothing of the penalty, and w the weight before it:

    w <- w_hat / (1 + p * lr * decay * |w|^(p - 2))

Fixed points are those of loss + decay * sum |w|^p, in the inner optimizer's metric. The gradient of |w|^p has no bound
at 0 for p < 1; the division only shrinks, never flips a sign, and tends to 0 exactly where that gradient diverges.
At p = 2 with rate lr it is AdamW at rate lr / (1 + 2 lr decay) with weight_decay = 2 * decay.

Zero is absorbing for p < 2: tensors that begin at zero (LoRA's B, zero-initialised residual branches) need decay 0 or a
`ramp`, and too strong a decay early prunes before anything is learned.

Paper and released code differ by a factor: `decay` here is the code's, lambda_paper = p * decay. Neither sets small
weights to zero, they count |w| < 1e-13; here a weight at or below `zero_below`, 1e-13 unless told, is zero after the
step if p < 2 (0 leaves them alone). The released |w|^(2-p) / (|w|^(2-p) + p lr decay) is the same number, but 0/0 and
inf/inf at w = 0 for lr = 0 and p > 2. `ramp` is ours. The factor is computed in float32 at least; weights in half
precision need master weights, since their own rounding is coarser than a step's decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import PlanError
from ..registry import register
from .p_norm import Decay, Exponent, count_step, group_defaults
from .wrapper import OptimizerWrapper


@register(
    "pwd",
    acts_on="optim",
    paper="2404.10824",
    description="around any optimizer: decoupled weight decay for any p norm; p <= 1 makes weights exactly zero",
)
class PNormDecay(OptimizerWrapper):
    """p-norm weight decay around any optimizer, whose own weight decay must be 0 where this one acts.

    decay: factor of sum |w|^p. p: positive, or points (step, p). ramp: steps over which the decay rises from 0.
    zero_below: see the module. min_dims: tensors of fewer dimensions (biases, norm gains) are left alone. All five are
    keys of the groups, for values of their own and for schedulers. Parameters without a gradient are left alone.
    Between the two halves of a step it holds one number for every decayed weight, and nothing after it; `PAdamW` and
    `PSGD` hold nothing, and take one pass instead of three (docs/results/optimizers.md).
    Raises PlanError for values out of range, and if a group is decayed twice.
    """

    def __init__(
        self,
        inner: Optimizer,
        decay: float = 1e-2,
        p: Exponent = 1.0,
        *,
        ramp: int = 0,
        zero_below: float = 1e-13,
        min_dims: int = 2,
    ) -> None:
        super().__init__(inner, {"decay": decay, **group_defaults(p, ramp, zero_below, min_dims)})
        for index, group in enumerate(self.param_groups):
            if group["decay"] < 0:
                raise PlanError(f"pwd: decay {group['decay']} of group {index} must not be negative")
            if group["decay"] and group.get("weight_decay"):
                raise PlanError(
                    f"pwd: {type(inner).__name__} has weight_decay {group['weight_decay']} in group {index}, so its "
                    "weights would decay twice; set it to 0"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The inner optimizer's step, then the division. Returns what the inner step does."""
        due = []
        for group in self.param_groups:
            decay = Decay(group, "decay")
            # A closure may yet make gradients.
            weights = [w for w in group["params"] if decay.decays(w) and (closure is not None or w.grad is not None)]
            due.append((decay, weights, decay.divisors(weights)))
        loss = self.inner.step() if closure is None else self.inner.step(closure)
        for decay, weights, divisors in due:
            moved = [(w, divisor) for w, divisor in zip(weights, divisors) if w.grad is not None]
            decay.divide_([w for w, _ in moved], [divisor for _, divisor in moved])
        for group in self.param_groups:
            count_step(group)
        return loss
