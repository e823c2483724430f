"""Scales in the precision that files keep them in, so that a trained layer and its packed form multiply by the same."""

from __future__ import annotations

import torch
from torch import Tensor

from ..estimators import through


def as_stored(values: Tensor) -> Tensor:
    """values rounded to float16's 11 significant bits (but not to its range), with the gradient of the identity.

    A file keeps a tensor of such values exactly if they lie within 29 octaves of the largest (formats/scales.py).
    """
    mantissa, exponent = torch.frexp(values.detach())
    return through(values, torch.ldexp((mantissa * 2048).round() / 2048, exponent), values.new_ones(()))
