"""Low rank by activation-weighted SVD: the best rank-r product in the layer's own metric, its factors quantised.

Low rank in the metric of the inputs is the idea of SVD-LLM (arXiv 2403.07378); the row weights on the other side come
from Fisher-weighted SVD (arXiv 2207.00112). With D = diag(row_weight) and the metric H, the problem

    min over L, R of  tr(D (W - L R) H (W - L R)^T)

is, for A = D^1/2 W C with C C^T = H, the plain best rank-r approximation of A (Eckart and Young): the least loss is the
sum of the squared singular values of A beyond the r-th. With U the first r left singular vectors,

    L = D^-1/2 U,    R = (L^T D L)^-1 L^T D W

R needs no inverse of C: for a given L it is the least-squares answer in the row metric alone, whatever H is. So we take
it after L has been rounded, and R makes up for L's rounding. The singular vectors come from the Gram matrix of the
smaller side: A A^T = D^1/2 W H W^T D^1/2 directly, or C^T W^T D W C with a Cholesky factor of the damped H.

Rank 0 is the zero matrix, the way to drop a weight the output does not depend on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightError
from ..formats import Dense16, Integer, LowRank, PackedWeight
from ..registry import register
from .contract import Candidate, Compressor, LayerView
from .groups import require_finite

_DAMPING = 1e-8  # of the metric's largest eigenvalue: the least that any direction counts
_LARGEST_SIDE = 2048  # an eigendecomposition of a larger side takes longer than all other candidates together
_FACTOR_GROUP = 64


def left_vectors(layer: LayerView) -> tuple[Tensor, Tensor]:
    """U and the singular values of D^1/2 W H^1/2: float64 [rows, k] and [k] falling, k = min(rows, cols)."""
    metric = layer.hessian[0].double()
    weighted = layer.weight.double() * _row_root(layer)[:, None]
    if layer.rows <= layer.cols:
        values, vectors = torch.linalg.eigh(_symmetric(weighted @ metric @ weighted.T))
        return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()
    # A root that exists for any positive semi-definite metric, singular or, by rounding, a little less than that.
    spectrum, basis = torch.linalg.eigh(_symmetric(metric))
    factor = basis * spectrum.clamp_min(_DAMPING * float(spectrum[-1]) or 1.0).sqrt()
    values, vectors = torch.linalg.eigh(_symmetric(factor.T @ (weighted.T @ weighted) @ factor))
    vectors = weighted @ (factor @ vectors.flip(1))
    # orthonormal even where the singular value is zero
    return torch.linalg.qr(vectors).Q, values.flip(0).clamp_min(0).sqrt()


def factor(layer: LayerView, left: Tensor, factor_bits: int) -> LowRank:
    """The packed product for the first singular vectors `left` [rows, rank]."""
    root = _row_root(layer)[:, None]
    packed_left = _pack((left / root).float(), factor_bits)
    stored = packed_left.decode().double() * root
    right = torch.linalg.pinv(stored.T @ stored, hermitian=True) @ (stored.T @ (layer.weight.double() * root))
    return LowRank.from_factors(packed_left, _pack(right.float(), factor_bits))


def _pack(matrix: Tensor, bits: int) -> PackedWeight:
    return Dense16.encode(matrix) if bits == 16 else Integer.encode(matrix, bits, _FACTOR_GROUP)


def _row_root(layer: LayerView) -> Tensor:
    """D^1/2, float64 [rows], at mean 1; rows that never matter keep a little weight so that L stays finite."""
    weight = layer.row_weight.double()
    mean = weight.mean()
    return (weight / mean).clamp_min(1e-6).sqrt() if float(mean) > 0 else torch.ones_like(weight)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


@register(
    "svd",
    acts_on="compress",
    paper="2403.07378",
    description="activation-weighted low rank with quantised factors; rank 0 drops the weight",
)
class LowRankSVD(Compressor):
    """left [rows, rank] @ right [rank, cols], the best in the layer's metric."""

    name = "svd"

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        """Rank 0, then ranks on a geometric ladder; [] for grouped convolutions, whose groups do not share a metric."""
        if layer.groups != 1:
            return []
        side = min(layer.rows, layer.cols)
        ranks = sorted({side // part for part in (64, 32, 16, 8)} - {0}) if side <= _LARGEST_SIDE else []
        return [{"rank": 0}, *({"rank": rank, "factor_bits": 4} for rank in ranks)]

    def compress(self, layer: LayerView, rank: int = 0, factor_bits: int = 8) -> LowRank:
        """rank 0..min(rows, cols); factor_bits: 2..8 integers in groups of 64, or 16 for fp16 factors.

        Raises `WeightError` for a grouped layer or a rank out of range, and on numbers that are not finite.
        """
        require_finite(layer)
        if layer.groups != 1:
            raise WeightError(f"{layer.name}: low rank does not act on grouped convolutions; choose another method")
        if not 0 <= rank <= min(layer.rows, layer.cols):
            raise WeightError(f"{layer.name}: rank {rank} is not within 0..{min(layer.rows, layer.cols)}")
        if rank == 0:
            empty = (
                Dense16.encode(layer.weight.new_zeros(layer.rows, 0)),
                Dense16.encode(layer.weight.new_zeros(0, layer.cols)),
            )
            return LowRank.from_factors(*empty)
        return factor(layer, left_vectors(layer)[0][:, :rank], factor_bits)

    def candidates(self, layer: LayerView) -> Iterator[Candidate]:
        """As the base class, with one decomposition for all ranks."""
        left = None
        for options in self.offers(layer):
            if options["rank"] == 0:
                yield self.candidate(layer, options, self.compress(layer, rank=0))
                continue
            left = left_vectors(layer)[0] if left is None else left
            packed = factor(layer, left[:, : options["rank"]], options["factor_bits"])
            yield self.candidate(layer, options, packed)
