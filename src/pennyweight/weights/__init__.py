"""Functions of one weight tensor, for training: one file a method, each a `WeightTransform`."""

from __future__ import annotations

from .base import WeightTransform

__all__ = ["WeightTransform"]
