"""CGA: freeze the weights whose code is certain, so that training settles instead of oscillating.

Confidence-guided annealing of Oscillation-free Quantization for Low-bit Vision Transformers, arXiv 2302.02210. A last
phase of quantisation-aware training. At every step, for each weight:

    near = distance of the weight from the closest boundary between two codes, in steps, <= band
    gradient *= near;      optimizer.step();      weights that are not near: exactly as before the step

`near` is recomputed with the quantiser's current scale, so a weight that leaves the band stays where it is, and the
band drains. Restoring undoes momentum and decoupled decay.

The released code skips its masking under a loss scaler, and masks nothing of OFQ's query-key matrix. Here the hooks run
inside `optimizer.step`, whatever scales the gradients; and where a quantiser sees a function of the latent weight in
another shape (the query-key product), what is masked is the gradient of that function's output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import PlanError
from ..registry import register


class _Frozen(NamedTuple):
    latent: nn.Parameter
    near: Tensor
    before: Tensor


@register(
    "cga",
    acts_on="optim",
    paper="2302.02210",
    description="around any optimizer's step: only weights close to a decision boundary move (OFQ)",
    combines_with=("statsq", "lsq"),
)
class ConfidenceGuidedAnnealing(nn.Module):
    """Acts on the weights of `model` whose last transform has a `boundary_distance` (statsq, lsq).

    Call `before_step` when gradients are whole and `after_step` when weights have changed (training/hooks.py attaches
    both). band: in quantisation steps; 0.003 to 0.01 were tried, 0.5 frees all but the outermost. start: progress 0..1
    from which it acts; at the default 0 always. Raises `PlanError` on a negative band or a model without such weights.
    """

    progress: Tensor

    def __init__(self, model: nn.Module, band: float = 0.005, start: float = 0.0) -> None:
        super().__init__()
        if not band >= 0 or not 0 <= start <= 1:
            raise PlanError(
                f"cga: band {band} must not be negative, and start {start} is a share of the training, 0 to 1"
            )
        self.band, self.start = band, start
        self.register_buffer("progress", torch.zeros(()))
        # In a list, so that the model's modules do not become this module's.
        self._chains: list[Any] = [
            chain
            for chain in model.modules()
            if isinstance(chain, ParametrizationList) and hasattr(chain[-1], "boundary_distance")
        ]
        if not self._chains:
            raise PlanError("cga: no weight of the model has a quantiser with decision boundaries; use statsq or lsq")
        self._frozen: list[_Frozen] = []
        self._mask_products()

    def _acts(self) -> bool:
        return self.start == 0 or bool(self.progress >= self.start)

    def _mask_products(self) -> None:
        """Tell the products of latent weights whether to mask their gradients from the next forward pass on."""
        band = self.band if self._acts() else None
        for chain in self._chains:
            if hasattr(chain[0], "freeze_outside"):
                chain[0].freeze_outside(chain[-1], band)

    @torch.no_grad()
    def before_step(self) -> None:
        """Mask the gradients, and keep what must not move."""
        self._frozen.clear()
        self._mask_products()
        if not self._acts():
            return
        for chain in self._chains:
            latent = chain.original
            *before, last = chain
            weight = latent
            for transform in before:
                weight = transform(weight)
            if weight.shape != latent.shape or latent.grad is None:
                continue
            near = last.boundary_distance(weight) <= self.band
            latent.grad.mul_(near)
            self._frozen.append(_Frozen(latent, near, latent.clone()))

    @torch.no_grad()
    def after_step(self) -> None:
        """Put back what was frozen, bit for bit."""
        for latent, near, before in self._frozen:
            latent.copy_(torch.where(near, latent, before))
        self._frozen.clear()
