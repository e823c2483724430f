"""The composed binariser of weights: signs times a scale. Published operators are settings of its parts.

    v = pre(w)                  none | centred: w - mean | standardised: gain (w - mean) / sqrt(var + 1e-5)
    b = estimator(v)            -1 or +1, sign(0) = +1; the estimator names the backward
    s                           none: 1 | layer: mean |v| | output: mean |v| of each output | learned, one an output
                                half-maximum: max |v| / 2 of each output, detached always
    forward   b s

Means and (unbiased) variances are per output and part of the graph. s is detached, or stays in the graph:
dL/dv = s surrogate(v) G + sign(v)/n sum(G b), G = dL/d(b s), n the number of weights that share s.

    BNN       1602.02830    ste, no scale            ReSTE    2308.06689    reste, layer, not detached
    XNOR-Net  1603.05279    ste, output              ReCU     2103.12369    standardised (2 sqrt 2), recu, learned
    DoReFa    1606.06160    ste, layer (one bit)     BiPer    2404.01278    biper, learned
    Bi-Real   1808.00278    ste, output              XNOR++   1909.13863    ste, learned from 1
    ReActNet  2003.03488    ste, output              PokeBNN  2112.00133    pokebnn (channel), half-maximum

Delayed binarisation: below `start` of the progress the layer uses real weights, `before` says which: "weight" is v
itself, without the scale of magnitudes it has anyway (PokeBNN's first epochs; two-stage training); "approximation" is
what the estimator's backward pretends (BiPer's sine, its first stage), times the learned scale.

Departures: BiBench's code passes the gradient of its convolutions around the scale and that of its linear layers
through it; here it always goes through it, as in the papers' formulas (Adam and batch norm hide the difference). Its
sgn(0) = 0 is +1 here. A learned scale starts at mean |v|; the released ReCU and BiPer start uniform in [0, 1): `init`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import PlanError, WeightError
from ..estimators import make_estimator
from ..formats import Binary, PackedWeight
from ..registry import register
from .base import WeightTransform, per_output, require_finite

Pre = Literal["none", "centred", "standardised"]
Scale = Literal["none", "layer", "output", "learned", "half-maximum"]
Init = Literal["mean", "ones", "uniform"]
Before = Literal["weight", "approximation"]
_VARIANCE_FLOOR = 1e-5


@register("binary", acts_on="weights", paper="1603.05279", description="signs times a scale, composed of parts")
class BinaryWeight(WeightTransform):
    """See the module.

    estimator: a name, or a mapping with `name` and the estimator's settings. pre, gain: what happens before the sign;
    gain acts with "standardised" only. scale, detached, init: as above; `init` is of a learned scale. start, before:
    progress 0..1 from which weights are binary, and what they are until then. Raises `PlanError` on other values.
    """

    discrete: ClassVar[bool] = True
    bits = 1
    progress: Tensor
    scale: nn.Parameter | None

    def __init__(
        self,
        estimator: str | dict[str, Any] = "ste",
        pre: Pre = "none",
        gain: float = 1.0,
        scale: Scale = "output",
        detached: bool = True,
        init: Init = "mean",
        start: float = 0.0,
        before: Before = "weight",
    ) -> None:
        super().__init__()
        for option, value, allowed in (
            ("pre", pre, Pre),
            ("scale", scale, Scale),
            ("init", init, Init),
            ("before", before, Before),
        ):
            if value not in allowed.__args__:
                raise PlanError(f"binary weights: {option} is {value!r}; choose one of {', '.join(allowed.__args__)}")
        if not 0 <= start <= 1:
            raise PlanError(f"binary weights: start is {start}; it is a share of the training, 0 to 1")
        settings = {"name": estimator} if isinstance(estimator, str) else dict(estimator)
        if "name" not in settings:
            raise PlanError("binary weights: the estimator needs a name, such as {name: reste, o_end: 3}")
        self.estimator = make_estimator(**settings)
        if self.estimator.step != "sign":
            raise PlanError(f"binary weights: estimator {settings['name']!r} rounds; choose one whose step is the sign")
        self.pre, self.gain = pre, gain
        self.scale_rule, self.detached, self.init = scale, detached, init
        self.start, self.before = start, before
        self.register_buffer("progress", torch.zeros(()))
        self.register_parameter("scale", None)

    def fit(self, weight: Tensor) -> None:
        """Make the learned scale. Raises `WeightError` if the weight is not finite, or all of it is one number."""
        require_finite(weight)
        if weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
            raise WeightError(
                "all weights are equal (zero variance), so that their signs tell nothing; initialise the layer or "
                "exclude it"
            )
        if self.scale_rule != "learned":
            return
        values = {
            "mean": lambda: self.before_sign(weight.detach()).abs().flatten(1).mean(1),
            "ones": lambda: weight.new_ones(len(weight)),
            "uniform": lambda: torch.rand_like(weight[(slice(None), *[0] * (weight.ndim - 1))]),
        }
        self.scale = nn.Parameter(values[self.init]().detach().clone())

    def before_sign(self, weight: Tensor) -> Tensor:
        """v: the weight as the estimator gets it."""
        if self.pre == "none":
            return weight
        rows = weight.flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        if self.pre == "standardised":
            # Of a single weight an output there is no unbiased variance; centred, it is zero.
            variance = rows.var(1, keepdim=True, correction=min(1, rows.shape[1] - 1))
            centred = centred * (self.gain / (variance + _VARIANCE_FLOOR).sqrt())
        return centred.view_as(weight)

    def is_binary(self) -> bool:
        """Whether the progress has come to `start`. Only delayed binarisation has to look, and waits for the device."""
        return self.start == 0 or bool(self.progress >= self.start)

    def scale_of(self, v: Tensor) -> Tensor | None:
        """s [outputs] for the weight before the sign, or None for 1."""
        if self.scale_rule == "none":
            return None
        if self.scale_rule == "learned":
            return self.scale
        if self.scale_rule == "half-maximum":
            return v.detach().abs().flatten(1).amax(1) / 2
        size = (v.detach() if self.detached else v).abs()
        return size.flatten(1).mean(1) if self.scale_rule == "output" else size.mean().expand(len(v))

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        v = self.before_sign(weight)
        if self.is_binary():
            return self.estimator(v), self.scale_of(v)
        if self.before == "weight":
            return v, None
        return self.estimator.approximation(v), self.scale_of(v)

    def forward(self, weight: Tensor) -> Tensor:
        codes, scale = self.factors(weight)
        return codes if scale is None else codes * per_output(scale, codes).to(codes.dtype)

    def packed(self, weight: Tensor) -> PackedWeight:
        """Signs with scale 1. Raises `WeightError` before `start`, and if the weight is not finite."""
        require_finite(weight)
        if not self.is_binary():
            raise WeightError(
                f"the weights are still real: they become binary at progress {self.start:g}, and training stands at "
                f"{float(self.progress):g}; train on, or set_progress(model, 1)"
            )
        codes = self.factors(weight)[0].detach().flatten(1)
        return Binary.from_signs(codes >= 0, codes.new_ones(len(codes), 1), 0)

    def extra_repr(self) -> str:
        parts = [f"pre={self.pre}", f"scale={self.scale_rule}", f"detached={self.detached}"]
        return ", ".join(parts + ([f"start={self.start:g}"] if self.start else []))
