"""Modules of the forward graph: where weights sit in a model, packed layers, quantised inputs and outputs."""

from . import (  # noqa: F401  (importing a method registers it)
    a_fan,
    batch_channel_norm,
    denoise_affine_activation,
    dorefa_activation,
    dprelu,
    eman,
    fda_activation,
    lsq_activation,
    mimicnorm,
    pokebnn_activation,
    psilon_block,
    query_key,
    residual_scaling,
    rprelu,
    sign_activation,
    spatial_scale,
)
from .base import LayerTransform
from .packed import PackedModule, install, packed_weights
from .sites import MatrixView, WeightSite, weight_sites

__all__ = ["LayerTransform", "MatrixView", "PackedModule", "WeightSite", "install", "packed_weights", "weight_sites"]
