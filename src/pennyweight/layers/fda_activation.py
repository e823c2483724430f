"""FDA: Frequency Domain Approximation for Binary Neural Networks, arXiv 2103.00841: its activations.

    forward    sgn(a) + lambda eta(a)        eta over the channels of each position; layers/noise_adaptation.py
    backward   the `fda` estimator, the true gradient of eta

The released module is made in the first forward, too late for the optimizer; here `for_layer` makes it.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import WeightError
from ..registry import register
from .base import SignInput, channels_of
from .noise_adaptation import NoiseAdaptation
from .sign_activation import SignActivation


@register("fda", acts_on="layers", paper="2103.00841", description="signs with a noise that fades in training (FDA)")
class FDAActivation(SignActivation):
    """omega: base frequency of the estimator."""

    def __init__(self, omega: float = 0.1) -> None:
        super().__init__({"name": "fda", "omega": omega})
        self.noise: NoiseAdaptation | None = None

    def for_layer(self, layer: nn.Module) -> None:
        super().for_layer(layer)
        self.noise = NoiseAdaptation(channels_of(layer)[0])

    def codes(self, x: Tensor) -> Tensor:
        assert self.noise is not None, "for_layer comes first"
        last = x.movedim(-self.axis, -1)
        return super().codes(x) + self.noise(last).movedim(-1, -self.axis)

    def sign_input(self) -> SignInput | None:
        if self.noise is not None and not self.noise.is_over():
            raise WeightError(
                "FDA still adds noise to the signs of the inputs; train to the end of the schedule, or "
                "set_progress(model, 1)"
            )
        return super().sign_input()
