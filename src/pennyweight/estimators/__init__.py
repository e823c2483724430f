"""How a gradient crosses a step: exact sign or round forward, a named surrogate backward. One file a family."""

from . import straight_through  # noqa: F401  (importing a method registers it)
from .base import Estimator, make_estimator, sign

__all__ = ["Estimator", "make_estimator", "sign"]
