"""From sparse training to a small file: which real weights are packed, and in which format.

A weight is packed if that makes the file smaller: its zeros as zeros under the mask of `sparse`, the other values as
they are. How many zeros that takes is decided by counting bytes, not by a threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bundle import blob_entry_bytes, rest_bytes
from ..compress.dense import half_precision, may_be_sparse
from ..errors import WeightError
from ..formats import PackedWeight, Sparse
from ..layers.sites import WeightSite, weight_sites


def real_weights(model: nn.Module, half: bool = False) -> dict[str, PackedWeight]:
    """Name -> packed weight of every weight site that is smaller packed than as a plain tensor of the file.

    half: values are rounded to 16 bits. Otherwise they are kept exactly, and what is not sparse stays as it is. Raises
    `WeightError`, naming the weight, for values that are not finite.
    """
    found: dict[str, PackedWeight] = {}
    for site in weight_sites(model):
        weight = site.matrix()
        if not bool(torch.isfinite(weight).all()):
            raise WeightError(
                f"{site.name} holds NaN or infinite values; training has diverged, go back to a checkpoint"
            )
        plain = site.parameter.detach()
        made: list[PackedWeight] = _exact(site, weight)
        if half:
            made = [half_precision(weight)]
            plain = plain.to(torch.float16)
        paying = [m for m in made if m.nbytes + blob_entry_bytes(site.name, m.nbytes) < rest_bytes(plain)]
        if paying:
            found[site.name] = min(paying, key=lambda packed: packed.nbytes)
    return found


def is_sparse(model: nn.Module) -> bool:
    """Whether some weight of a model has enough zeros to be stored as `sparse`."""
    return any(may_be_sparse(site.parameter.detach()) for site in weight_sites(model))


def _exact(site: WeightSite, weight: Tensor) -> list[PackedWeight]:
    """The sparse forms of a weight that hold the very values of the parameter."""
    if not may_be_sparse(weight):
        return []
    made = [Sparse.encode(weight, weight != 0, bits) for bits in (16, 32)]
    stored = [site.view.from_matrix(packed.decode()).to(site.parameter.dtype) for packed in made]
    return [packed for packed, values in zip(made, stored) if torch.equal(values, site.parameter)]
