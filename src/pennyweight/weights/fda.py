"""FDA: Frequency Domain Approximation for Binary Neural Networks, arXiv 2103.00841: its weights.

forward    mean |w| (sgn(w) + lambda eta(w))          eta over each output's weights; layers/noise_adaptation.py
backward   the `fda` estimator, the true gradient of eta; the mean per output is detached
"""

from __future__ import annotations

from torch import Tensor

from ..errors import WeightError
from ..formats import PackedWeight
from ..layers.noise_adaptation import NoiseAdaptation
from ..registry import register
from .binary import BinaryWeight


@register("fda", acts_on="weights", paper="2103.00841", description="signs with a noise that fades in training (FDA)")
class FDAWeight(BinaryWeight):
    """omega: base frequency of the estimator. Binary at progress 1; before that `packed` raises `WeightError`."""

    def __init__(self, omega: float = 0.1) -> None:
        super().__init__({"name": "fda", "omega": omega})
        self.noise: NoiseAdaptation | None = None

    def fit(self, weight: Tensor) -> None:
        super().fit(weight)
        self.noise = NoiseAdaptation(weight[0].numel()).to(weight)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        signs, scale = super().factors(weight)
        assert self.noise is not None, "fit comes first"
        return signs + self.noise(weight.flatten(1)).view_as(weight), scale

    def packed(self, weight: Tensor) -> PackedWeight:
        if self.noise is not None and not self.noise.is_over():
            raise WeightError(
                f"FDA still adds noise to the signs (progress {float(self.progress):g}); train to the end of the "
                "schedule, or set_progress(model, 1)"
            )
        return super().packed(weight)
