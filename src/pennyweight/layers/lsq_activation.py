"""LSQ activations (arXiv 1902.08153) with the shifts of OFQ (arXiv 2302.02210).

    y = a round(clamp((x + beta) / a, lo, hi)) + gamma          beta, gamma: learned per channel from 0, if asked for
    signed        lo, hi = -2^(b-1), 2^(b-1) - 1,   a starts at 2 mean |x| / sqrt(hi)
    non-negative  lo, hi = 0, 2^b - 1,              a starts at 4 mean |x| / sqrt(hi)
    backward      into x: 1 inside [lo, hi], else 0;   into a: g sum G (code - x / a), the end of the range outside;
                  g = 1 / sqrt(hi count), count: numbers of a sample that share the step

Which range it is, the data says at `fit`, unless `signed` does. OFQ's code has a step for each token ("per channel" in
its options), which ties the model to one length of its input: per="token". At one bit the signed range is -1 and 0,
whose gradient dies; it is refused, the method `sign` is for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import DataError, PlanError
from ..estimators import make_estimator, through
from ..registry import register
from .base import LayerTransform, channels_of, per_channel

Shared = Literal["layer", "channel", "token"]


@register(
    "lsq", acts_on="layers", paper="1902.08153", description="inputs of n bits, the step learned by gradient (LSQ)"
)
class LearnedStepActivation(LayerTransform):
    """x [samples, ...], channels where the layer has them, tokens on the axis before the last.

    bits: 1 to 8. signed: whether codes reach below 0; None: if the data does. per: what shares a step, "layer",
    "channel" or "token". shift: learn beta and gamma. Raises `PlanError` on other values.
    """

    needs_data: ClassVar[bool] = True
    step: nn.Parameter
    shift_in: nn.Parameter | None
    shift_out: nn.Parameter | None
    ends: Tensor

    def __init__(self, bits: int, signed: bool | None = None, per: Shared = "layer", shift: bool = False) -> None:
        super().__init__()
        if bits not in range(1, 9):
            raise PlanError(f"'lsq' inputs have 1 to 8 bits, not {bits}")
        if per not in ("layer", "channel", "token"):
            raise PlanError(f"'lsq' inputs: per is {per!r}; choose 'layer', 'channel' or 'token'")
        self.bits, self.signed, self.per, self.has_shift = bits, signed, per, shift
        self.round = make_estimator("round")
        self.axis = 1  # of the channels, from the end
        self.step = nn.Parameter(torch.ones(1))
        self.register_buffer("ends", torch.tensor(self._range(bits > 1 and signed is not False)))
        self.register_parameter("shift_in", None)
        self.register_parameter("shift_out", None)

    def for_layer(self, layer: nn.Module) -> None:
        channels, self.axis = channels_of(layer)
        if self.has_shift:
            like = next(layer.parameters())
            self.shift_in = nn.Parameter(torch.zeros(channels, dtype=like.dtype, device=like.device))
            self.shift_out = nn.Parameter(torch.zeros(channels, dtype=like.dtype, device=like.device))

    def _range(self, signed: bool) -> tuple[float, float]:
        """lo and hi."""
        most = 2.0 ** (self.bits - signed) - 1
        return (-most - 1 if signed else 0.0), most

    @property
    def _step_axis(self) -> int:
        return {"layer": 1, "channel": self.axis, "token": 2}[self.per]

    def _per_step(self, x: Tensor) -> Tensor:
        """x as [steps, the numbers that share each]."""
        return x.reshape(1, -1) if self.per == "layer" else x.movedim(-self._step_axis, 0).flatten(1)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Choose the range and start the steps from inputs [samples, ...].

        Raises `DataError` if there are none, one is not finite, all are zero, or differ in length where tokens have
        their own steps, or if the signed range is needed at one bit.
        """
        total, count, lowest = torch.zeros(1), 0, math.inf
        for x in batches:
            if not bool(torch.isfinite(x).all()):
                raise DataError("lsq: the calibration data holds NaN or infinity; remove those samples")
            x = x.detach().float()
            self._check_tokens(x, len(total) if count else None)
            rows = self._per_step(x)
            total, count = total.to(x.device) + rows.abs().sum(1), count + rows.shape[1]
            lowest = min(lowest, float(x.min()))
        if not count or not bool(total.any()):
            raise DataError("lsq: the calibration data is empty or all zero; pass batches that reach this layer")
        signed = lowest < 0 if self.signed is None else self.signed
        if signed and self.bits == 1:
            raise DataError("lsq: inputs of one bit that can be negative have no gradient here; use the method 'sign'")
        mean = total / count
        mean = torch.where(mean > 0, mean, mean.mean())  # a channel that was never seen to be used
        self.ends = torch.tensor(self._range(signed), device=mean.device)
        self.step = nn.Parameter((2 if signed else 4) * mean / self.ends[1].sqrt())

    def _check_tokens(self, x: Tensor, tokens: int | None) -> None:
        if self.per == "token" and (x.ndim < 3 or tokens not in (None, x.shape[-2])):
            raise DataError(
                f"lsq: an input of shape {list(x.shape)} does not have the {tokens or 'tokens'} steps that per='token' "
                "makes, one a token; use per='layer' or 'channel' for inputs that vary in length"
            )

    def forward(self, x: Tensor) -> Tensor:
        self._check_tokens(x, len(self.step))
        low, high = self.ends.to(x.dtype)
        with torch.no_grad():
            g = (x[:1].numel() / self.step.numel() * self.ends[1]).rsqrt()
        step = through(self.step, self.step.clone(), g).abs().clamp_min(torch.finfo(x.dtype).tiny)
        step = per_channel(step.to(x.dtype), self._step_axis)
        shifted = x if self.shift_in is None else x + per_channel(self.shift_in, self.axis).to(x.dtype)
        y = self.round((shifted / step).clamp(low, high)) * step
        return y if self.shift_out is None else y + per_channel(self.shift_out, self.axis).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per={self.per!r}, shift={self.has_shift}"
