"""The contract of an estimator: an exact step forward, a named surrogate backward.

    forward    y = -1 where x < 0, else +1            step "sign" (sign(+-0) = +1; NaN stays NaN)
               y = round half to even                 step "round"
    backward   dL/dx = dL/dy * surrogate(x)           elementwise, with the x and the `progress` of the forward pass

    approximation(x) is the function the backward pass pretends the forward was: its derivative is the surrogate.

A method's file defines surrogate, approximation and their settings, nothing else: shifts, scales and clamps around the
step belong to weights/ and layers/.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import registry
from ..errors import PlanError


def sign(x: Tensor) -> Tensor:
    """-1 where x < 0, +1 where x >= 0 (so at both zeros), NaN where x is NaN; shape and dtype of x."""
    # The clamp makes 1 of everything but NaN, and the sum +0 of -0. On a CPU this takes a tenth of the time of `where`.
    return torch.copysign(x.clamp(1, 1), x + 0.0)


class _Through(torch.autograd.Function):
    """`value` in place of x; backward is the incoming gradient times `slope`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None


def through(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """`value`, exactly, in place of x; the gradient goes to x alone, multiplied by `slope` (broadcasts against it)."""
    return _Through.apply(x, value.detach(), slope.detach())


class Estimator(nn.Module, ABC):
    """A step function that a gradient crosses. Registered with `@register(name, acts_on="estimators", ...)`.

    `progress` is how far training has come, 0 (start) to 1 (end): a float32 scalar buffer that schedules write and
    checkpoints keep. Annealed families read it in `surrogate`; all have it.
    """

    step: ClassVar[Literal["sign", "round"]] = "sign"
    progress: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("progress", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The step of x, exactly; dtype and shape of x. The gradient crosses it as `surrogate` says."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.exact(x)
        return self.cross(x)

    def cross(self, x: Tensor) -> Tensor:
        """`forward` where a gradient is wanted. Overridden where the backward is one operation of torch."""
        with torch.no_grad():
            value, slope = self.exact(x), self.surrogate(x)
        return through(x, value, slope)

    def exact(self, x: Tensor) -> Tensor:
        """The step alone; `forward` gives it the surrogate's gradient. Overridden where x is mapped before the step."""
        return sign(x) if self.step == "sign" else x.round()

    @abstractmethod
    def surrogate(self, x: Tensor) -> Tensor:
        """The factor of the incoming gradient at x; dtype and shape of x, finite wherever x is."""

    @abstractmethod
    def approximation(self, x: Tensor) -> Tensor:
        """Continuous F with F(0) = 0 and F' = surrogate almost everywhere, tensor statistics held fixed."""


def make_estimator(name: str, **options: Any) -> Estimator:
    """The registered estimator of that name with its settings.

    Raises `UnknownNameError` (with the close matches) on a name that is not registered, `PlanError` on a setting the
    estimator does not have or a value it refuses.
    """
    target = registry.get(name, "estimators").target
    known = list(inspect.signature(target).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise PlanError(
            f"estimator {name!r} has no setting {', '.join(map(repr, unknown))}; it has: {', '.join(known) or 'none'}"
        )
    return target(**options)
