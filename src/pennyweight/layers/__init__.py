"""Modules of the forward graph: where weights sit in a model, packed layers, activation quantisers."""

from .packed import PackedModule, install, packed_weights
from .sites import MatrixView, WeightSite, weight_sites

__all__ = ["MatrixView", "PackedModule", "WeightSite", "install", "packed_weights", "weight_sites"]
