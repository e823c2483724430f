"""Penalties on the p-norm of weights: the coupled counterpart of decoupled decay for any p norm.

Decoupled Weight Decay for Any p Norm, arXiv 2404.10824, decays apart from the gradient step; this is what it is
compared with: lambda sum |w|^p as part of the loss, whose gradient passes through the optimizer,

    penalty     strength sum (w^2 + eps^2)^(p/2) - eps^p                eps = 0 for p >= 1
    gradient    strength p w (w^2 + eps^2)^(p/2 - 1)

For p < 1 the gradient of |w|^p has no bound at 0: steps overshoot, and no weight becomes exactly zero. eps bounds it,
at strength p eps^(p-1) (1 - p)^((1-p)/2) / (2 - p)^((2-p)/2). Under weight transforms it is the latent weights that
are penalised.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..registry import register
from .base import Penalty


def p_norm_penalty(weight: Tensor, p: float, eps: float = 0.0) -> Tensor:
    """sum (w^2 + eps^2)^(p/2) - eps^p, a scalar; sum |w|^p for eps = 0."""
    if eps == 0:
        return weight.abs().pow(p).sum() if p != 1 else weight.abs().sum()
    return ((weight.square() + eps**2).pow(p / 2) - eps**p).sum()


@register(
    "p-norm",
    acts_on="losses",
    paper="2404.10824",
    description="lambda sum |w|^p in the loss: coupled decay, to compare with",
)
class PNormPenalty(Penalty):
    """penalty(model) -> scalar: strength times the sum over parameters that match.

    match: globs over parameter names; None: all with two axes or more (no biases, norms, scales). eps: None for 0 where
    p >= 1, else 1e-3. Raises `PlanError` for p or strength that make no sense, p < 1 without eps, and, when called, for
    patterns that match no parameter.
    """

    def __init__(
        self, p: float, strength: float = 1.0, match: Sequence[str] | None = None, eps: float | None = None
    ) -> None:
        super().__init__()
        if not p > 0 or not strength >= 0:
            raise PlanError(f"p-norm: p is {p:g}, strength {strength:g}; they must be positive")
        self.p, self.strength = float(p), float(strength)
        self.match = None if match is None else tuple(match)
        self.eps = (1e-3 if p < 1 else 0.0) if eps is None else float(eps)
        if self.eps < 0 or (p < 1 and self.eps == 0):
            raise PlanError(
                f"p-norm: eps is {self.eps:g}; for p below 1 it must be positive, the gradient has no bound"
            )

    def forward(self, model: nn.Module) -> Tensor:
        named = dict(model.named_parameters())
        if self.match is None:
            chosen = [p for p in named.values() if p.ndim >= 2]
        else:
            for pattern in self.match:
                if not fnmatch.filter(named, pattern):
                    raise PlanError(f"p-norm: no parameter matches {pattern!r}; there are: {', '.join(named)}")
            chosen = [p for n, p in named.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in self.match)]
        if not chosen:
            raise PlanError(f"p-norm: this {type(model).__name__} has no parameter of two axes; give match")
        return self.strength * torch.stack([p_norm_penalty(w, self.p, self.eps) for w in chosen]).sum()

    def extra_repr(self) -> str:
        return f"p={self.p:g}, strength={self.strength:g}, eps={self.eps:g}"
