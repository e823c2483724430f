"""Functions of one weight tensor, for training: one file a method, each a `WeightTransform`."""

from __future__ import annotations

from . import (  # noqa: F401  (importing a method registers it)
    binary,
    denoise_affine,
    dorefa,
    fda,
    lsq,
    pokebnn,
    psilon,
    statsq,
    weight_compander,
    weight_mean,
    weight_standardization,
)
from .base import WeightTransform

__all__ = ["WeightTransform"]
