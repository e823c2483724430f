"""Functions of one weight tensor, for training: one file a method, each a `WeightTransform`."""

from __future__ import annotations

from . import denoise_affine, lsq, statsq  # noqa: F401  (importing a method registers it)
from .base import WeightTransform

__all__ = ["WeightTransform"]
