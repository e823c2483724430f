"""From a trained checkpoint to a small one: observe, offer, plan, realise."""

from . import (  # noqa: F401  (importing a method registers it)
    adaquant,
    binary,
    codebook,
    dense,
    entropy_gptq,
    gptq,
    low_rank,
    rd_prune,
    round_to_nearest,
)
from .contract import Candidate, Compressor, LayerView, compressor

__all__ = ["Candidate", "Compressor", "LayerView", "compressor"]
