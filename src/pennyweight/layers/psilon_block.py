"""PSiLON's layers and residual blocks, whose 1-path-norm is a product of lengths (arXiv 2404.19112).

    PSiLONLinear    y = W x + c, W_k = g V_k / |V_k|_1                                    weights/psilon.py
    CReLU           [relu(z), -relu(-z)]: both halves of z, which sum to z
    PSiLONBlock     z + A relu(z) - B relu(-z) + c, A and B normalised jointly by max(|A|, |B|); g = 0, A = B at the
                    start: the identity, and linear until they part

Layers are ordinary Linear layers under the weight transform `psilon`, so that `fold` leaves Linear layers. V starts
orthogonal (halves: the same twice), biases at 0. `sparsify` and `sharpness` lead to exact zeros, see there.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..registry import register
from ..weights.psilon import L1WeightNorm


class CReLU(nn.Module):
    """z [..., n] -> [relu(z), -relu(-z)] [..., 2 n]."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z.relu(), z.clamp_max(0)], -1)


def psilon_linear(
    inputs: int,
    outputs: int,
    *,
    shared: bool = True,
    length: float = 1.0,
    pairs: bool = False,
    sparsify: float | None = None,
    sharpness: float | None = None,
) -> nn.Linear:
    """A Linear layer [..., inputs] -> [..., outputs] under L1 weight normalisation, see `L1WeightNorm`.

    length: what g starts at. pairs: of a layer behind CReLU; `inputs` counts both halves.
    """
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        if pairs:
            half = nn.init.orthogonal_(torch.empty(outputs, inputs // 2))
            layer.weight.copy_(torch.cat([half, half], 1))
        else:
            nn.init.orthogonal_(layer.weight)
        layer.bias.zero_()
    transform = L1WeightNorm(shared, length, sparsify, sharpness, pairs)
    transform.fit(layer.weight)
    parametrize.register_parametrization(layer, "weight", transform)
    return layer


def l1_norm_of(layer: nn.Module) -> L1WeightNorm | None:
    """The transform of a layer that `psilon_linear` made, or that a recipe gave `psilon` alone; else None."""
    chains = getattr(layer, "parametrizations", None)
    chain = chains["weight"] if chains is not None and "weight" in chains else ()
    return cast(L1WeightNorm, chain[0]) if len(chain) == 1 and isinstance(chain[0], L1WeightNorm) else None


@register(
    "psilon-block",
    acts_on="layers",
    paper="2404.19112",
    description="residual block of CReLU and an L1-normalised layer, the identity at the start",
    combines_with=("path-norm",),
)
class PSiLONBlock(nn.Module):
    """z [..., width] -> the same shape; see the module."""

    def __init__(self, width: int, *, sparsify: float | None = None, sharpness: float | None = None) -> None:
        super().__init__()
        self.activation = CReLU()
        self.linear = psilon_linear(2 * width, width, length=0.0, pairs=True, sparsify=sparsify, sharpness=sharpness)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.linear(self.activation(z))
