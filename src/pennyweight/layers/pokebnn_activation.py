"""PokeBNN's inputs of more than one bit: a bound for each channel, set once from data.

PokeBNN: A Binary Pursuit of Lightweight Accuracy, arXiv 2112.00133 (gates at 4 bits, stem and head at 8). Channel c of
x, b bits, bound B_c:

    signed          y = floor(clamp(n x / B, -n, n) + 1/2) B / n,        n = 2^(b-1) - 1
    non-negative    y = clamp(floor(n x / B), 0, n - 1) B / n,           n = 2^b
    backward        1 where the clamp changes nothing, else 0; none into B
    B_c = max(|mean of the batches' maxima|, |mean of the batches' minima|), zeros left out

A channel that holds nothing but zeros gets the largest bound of the others. Whether inputs are negative, the data says,
unless `signed` does. The released code takes B from running statistics (momentum 0.1) at one step of the training and
does not quantise before it; here `fit` takes it from the batches it is given, and may be called again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import DataError, PlanError
from ..estimators import through
from ..registry import register
from .base import LayerTransform, channels_of, per_channel


@register(
    "pokebnn",
    acts_on="layers",
    paper="2112.00133",
    description="inputs of n bits, a bound a channel from data (PokeBNN)",
)
class BoundedActivation(LayerTransform):
    """x [samples, ...] with the channels where the layer has them.

    bits: 2 to 8 (one bit is the method `sign`). signed: whether codes reach below 0; None: if the data does. Raises
    `PlanError` on other values.
    """

    needs_data: ClassVar[bool] = True
    bound: Tensor
    negative: Tensor

    def __init__(self, bits: int = 8, signed: bool | None = None) -> None:
        super().__init__()
        if bits not in range(2, 9):
            raise PlanError(f"'pokebnn' inputs have 2 to 8 bits, not {bits}; one bit is 'sign'")
        self.bits, self.signed = bits, signed
        self.axis = 1
        self.register_buffer("bound", torch.ones(1))
        self.register_buffer("negative", torch.tensor(signed is not False))

    def for_layer(self, layer: nn.Module) -> None:
        channels, self.axis = channels_of(layer)
        self.bound = torch.ones(channels, dtype=torch.float32)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Set the bounds from inputs as `forward` gets them. Raises `DataError` if there are none, or all are zero."""
        highs, lows = [], []
        for x in batches:
            channels = x.detach().float().movedim(-self.axis, 0).flatten(1)
            highs.append(channels.amax(1))
            lows.append(channels.amin(1))
        if not highs:
            raise DataError("pokebnn: the calibration data is empty; pass batches that reach this layer")
        high, low = torch.stack(highs), torch.stack(lows)
        bound = torch.maximum(_mean_of_others(high).abs(), _mean_of_others(low).abs())
        if not bool(bound.any()):
            raise DataError("pokebnn: the inputs of this layer are all zero; pass batches that reach it")
        self.bound = torch.where(bound > 0, bound, bound.max())
        self.negative = torch.as_tensor(
            bool((low < 0).any()) if self.signed is None else self.signed, device=bound.device
        )

    def forward(self, x: Tensor) -> Tensor:
        bound = per_channel(self.bound, self.axis).to(x.dtype)
        with torch.no_grad():
            n = torch.where(self.negative, 2 ** (self.bits - 1) - 1, 2**self.bits)
            lowest, highest = torch.where(self.negative, -n, 0), torch.where(self.negative, n, n - 1)
            scaled = x * n / bound
            before = torch.where(self.negative, scaled, scaled.floor())
            clamped = torch.minimum(torch.maximum(before, lowest), highest)
            codes = torch.where(self.negative, (clamped + 0.5).floor(), clamped)
        return through(x, codes * bound / n, (before == clamped).to(x.dtype))

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def _mean_of_others(extremes: Tensor) -> Tensor:
    """[batches, channels] -> mean over the batches, zeros left out; [channels]."""
    return extremes.sum(0) / extremes.count_nonzero(0).clamp_min(1)
