"""Binary activations: the sign of a layer's input, with a learned shift where wanted.

    forward    sgn(a + t_c)  (* mean |a| of the sample)       sgn(0) = +1
    backward   the estimator's surrogate, at (a + t_c) / sd in training mode where `standardise` asks for it, else at
               a + t_c; the same into the shift t, one number a channel, initially 0

sd = sqrt(unbiased variance of the sample over all but the batch + 1e-5), inside the graph. It is positive, so that the
forward does not depend on it, and only moves the surrogate's window: in eval mode it is left out. All-equal activations
have sd = sqrt(1e-5): the window becomes narrow, nothing else happens.

    BNN, DoReFa (BiBench)   ste                      ReActNet (2003.03488)   RSign: shift, bi-real
    XNOR-Net (1603.05279)   ste, sample scale        ReCU (2103.12369), BiPer (2404.01278)   bi-real, standardise
    Bi-Real (1808.00278)    bi-real                  ReSTE (2308.06689)      reste

Departures: XNOR-Net's paper scales by a map of box-filtered means; as in BiBench's code it is one scale a sample here,
without gradient. It differs from sample to sample, so that batch norm cannot absorb it: thresholds are not folded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..estimators import make_estimator
from ..registry import register
from .base import LayerTransform, SignInput, channels_of, per_channel, per_sample_mean_magnitude

_VARIANCE_FLOOR = 1e-5


@register("sign", acts_on="layers", paper="1602.02830", description="binary inputs: the sign, with a named estimator")
class SignActivation(LayerTransform):
    """See the module. x: [samples, ...] with the channels where the layer has them; any floating type.

    estimator: a name, or a mapping with `name` and its settings. shift: learn one a channel. standardise: divide by the
    sample's deviation in training. sample_scale: multiply by mean |x| of the sample. Raises `PlanError` on estimators
    that round.
    """

    bits = 1
    shift: nn.Parameter | None

    def __init__(
        self,
        estimator: str | dict[str, Any] = "ste",
        shift: bool = False,
        standardise: bool = False,
        sample_scale: bool = False,
    ) -> None:
        super().__init__()
        settings = {"name": estimator} if isinstance(estimator, str) else dict(estimator)
        if "name" not in settings:
            raise PlanError("sign activations: the estimator needs a name, such as {name: reste, o_end: 3}")
        self.estimator = make_estimator(**settings)
        if self.estimator.step != "sign":
            raise PlanError(
                f"sign activations: estimator {settings['name']!r} rounds; choose one whose step is the sign"
            )
        self.has_shift, self.standardise, self.sample_scale = shift, standardise, sample_scale
        self.axis = 1
        self.register_parameter("shift", None)

    def for_layer(self, layer: nn.Module) -> None:
        channels, self.axis = channels_of(layer)
        if self.has_shift:
            like = next(layer.parameters())
            self.shift = nn.Parameter(torch.zeros(channels, dtype=like.dtype, device=like.device))

    def codes(self, x: Tensor) -> Tensor:
        """The signs alone."""
        if self.shift is not None:
            x = x + per_channel(self.shift, self.axis)
        if self.standardise and self.training:
            numbers = x[:1].numel()
            variance = x.var(dim=tuple(range(1, x.ndim)), keepdim=True, correction=min(1, numbers - 1))
            x = x / (variance + _VARIANCE_FLOOR).sqrt()
        return self.estimator(x)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.codes(x), per_sample_mean_magnitude(x) if self.sample_scale else None

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.factors(x)
        return codes if scale is None else codes * scale

    def sign_input(self) -> SignInput | None:
        # x + t >= 0 exactly where x >= -t: a sum of floats is 0 or has the sign of the true sum.
        threshold = None if self.shift is None else -self.shift.detach().float()
        return SignInput(threshold, self.sample_scale)

    def extra_repr(self) -> str:
        return f"shift={self.has_shift}, standardise={self.standardise}, sample_scale={self.sample_scale}"


@register(
    "rsign", acts_on="layers", paper="2003.03488", description="binary inputs: sign with a learned shift (ReActNet)"
)
class RSign(SignActivation):
    """`SignActivation` with a learned shift for each channel and Bi-Real's estimator, as ReActNet has them."""

    def __init__(self, estimator: str | dict[str, Any] = "bi-real") -> None:
        super().__init__(estimator, shift=True)
