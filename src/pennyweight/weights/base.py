"""The contract of a weight transform: one function of one weight tensor, which a layer uses instead of the tensor.

Transforms are registered with torch.nn.utils.parametrize: the layer's latent weight lives on as
`parametrizations.weight.original`, and `layer.weight` is what the chain of transforms makes of it. The first of a chain
may have a method `right_inverse(weight)`: the latent weight that yields a given one, from which training starts. Axis 0
of a weight is the output (Linear, convolutions) or the entry (Embedding).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import WeightError
from ..formats import PackedWeight


class WeightTransform(nn.Module, ABC):
    """One function of one weight tensor, registered under `acts_on="weights"`. Its options are its constructor's.

    Several of them chain in order, a discrete one last. What a transform learns are its parameters, what it schedules
    its buffers. An attribute `bits`, where there is one, says what a code takes: cost tables read it.
    """

    discrete: ClassVar[bool] = False  # whether it yields codes times scales, which no further transform may follow

    def fit(self, weight: Tensor) -> None:
        """Set what depends on the weight (scales, steps, shapes) from it; `prepare` calls it once, with the shape and
        values that `forward` will get (with a `right_inverse`, first of a chain: will yield). Raises `WeightError` for
        weights that the method cannot represent.
        """

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """What the layer uses: the shape and dtype of `weight`, differentiable as the method has it."""

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """(codes, scale [outputs] or None) with forward(weight) = codes * scale.

        Linear layers and convolutions multiply by the scale after their product, which of small integers is exact.
        """
        return self(weight), None

    def packed(self, weight: Tensor) -> PackedWeight | None:
        """The stored form of the codes of `factors(weight)`, a matrix [outputs, the rest]; None if it is not discrete.

        Asked of the last of a chain with that transform's own input. Raises `WeightError` where the method promises
        discrete weights that these are not yet (a stage of training is missing).
        """
        del weight
        return None


def require_finite(weight: Tensor) -> None:
    """Raise `WeightError` if the weight is empty, or holds NaN or infinity."""
    if weight.numel() == 0:
        raise WeightError("the weight is empty; exclude the layer")
    if not bool(torch.isfinite(weight).all()):
        raise WeightError("the weight holds NaN or infinity; mend the checkpoint first")


def per_output(values: Tensor, weight: Tensor) -> Tensor:
    """values [outputs] in a shape that broadcasts against weight [outputs, ...]."""
    return values.view(-1, *[1] * (weight.ndim - 1))
