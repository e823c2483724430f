"""Denoising affine transform of activations, arXiv 2409.09245; formulas in weights/denoise_affine.py.

Blocks lie along the channels of one sample at one position, the axis that the layer sums over: no statistic crosses
samples or positions, in training as in eval mode, and nothing needs to be calibrated. Channels of a convolution that
are no multiple of the block leave a smaller block at their end. Scales are computed from the input each time, so that
they need not be rounded to what a file keeps.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..registry import register
from ..weights.denoise_affine import Backward, Bits, Denoiser, Mode, Sparsity
from .base import LayerTransform, channels_of


@register(
    "denoise-affine",
    acts_on="layers",
    paper="2409.09245",
    description="inputs of 1 to 8 bits, ternary or sparse, dequantised by a ridge regression inside the graph",
)
class DenoisedActivation(LayerTransform):
    """x with the channels where the layer has them. Options and errors are those of weights' denoise-affine."""

    def __init__(
        self,
        bits: Bits = 4,
        lam: float = 0.01,
        block: int = 128,
        mode: Mode | None = None,
        sparsity: Sparsity = None,
        backward: Backward = "error-aware",
    ) -> None:
        super().__init__()
        self.denoiser = Denoiser(bits, lam, block, mode, sparsity, backward)
        self.axis = 1

    def for_layer(self, layer: nn.Module) -> None:
        self.axis = channels_of(layer)[1]

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous, so that sums run in one order whatever else is in the batch.
        return self.denoiser(x.movedim(-self.axis, -1).contiguous()).movedim(-1, -self.axis)
