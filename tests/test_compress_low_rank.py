"""Low rank: Eckart and Young in the layer's metric, on both sides of square, with singular metrics and useless rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.compress.contract import LayerView
from pennyweight.compress.low_rank import LowRankSVD, left_vectors
from pennyweight.errors import WeightError


def random_layer(rows: int, cols: int, seed: int = 0, samples: int = 200) -> LayerView:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, cols, generator=generator, dtype=torch.float64) * torch.rand(cols, generator=generator)
    row_weight = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    weight = torch.randn(rows, cols, generator=generator)
    return LayerView("layer.weight", weight, (x.T @ x / samples)[None], row_weight)


def singular_values(layer: LayerView) -> torch.Tensor:
    """Of D^1/2 W H^1/2, by a plain SVD."""
    values, vectors = torch.linalg.eigh(layer.hessian[0])
    root = vectors * values.clamp_min(0).sqrt()
    return torch.linalg.svdvals(layer.row_weight.sqrt()[:, None] * layer.weight.double() @ root)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 24), cols=st.integers(1, 24), share=st.floats(0, 1))
def test_distortion_is_the_tail_of_squared_singular_values(seed, rows, cols, share):
    layer = random_layer(rows, cols, seed)
    rank = round(share * min(rows, cols))
    values = singular_values(layer)
    found = layer.distortion(LowRankSVD().compress(layer, rank=rank, factor_bits=16).decode())
    total, tail = float(values.square().sum()), float(values[rank:].square().sum())
    assert abs(found - tail) <= 2e-5 * total  # fp16 factors round at 2^-11, the loss at its square


@pytest.mark.parametrize("rows,cols", [(12, 20), (20, 12), (9, 9)])
def test_full_rank_loses_nothing_and_rank_zero_everything(rows, cols):
    layer = random_layer(rows, cols)
    nothing = layer.distortion(torch.zeros_like(layer.weight))
    full = LowRankSVD().compress(layer, rank=min(rows, cols), factor_bits=16)
    assert layer.distortion(full.decode()) < 1e-5 * nothing
    torch.testing.assert_close(full.decode(), layer.weight, rtol=0.01, atol=0.01)
    zero = LowRankSVD().compress(layer, rank=0)
    assert bool((zero.decode() == 0).all()) and zero.shape == (rows, cols)
    assert zero.nbytes < 64


@pytest.mark.parametrize("rows,cols", [(10, 30), (30, 10)])
def test_singular_values_are_those_of_the_weighted_matrix(rows, cols):
    layer = random_layer(rows, cols)
    layer.row_weight /= layer.row_weight.mean()
    vectors, values = left_vectors(layer)
    torch.testing.assert_close(values, singular_values(layer), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows,cols", [(10, 16), (40, 16)])
def test_singular_metric_and_rows_that_do_not_matter(rows, cols):
    layer = random_layer(rows, cols, samples=5)  # H has rank 5: rank 5 is enough
    layer.row_weight[3:] = 0.0
    layer.row_weight[0] = 1.0
    packed = LowRankSVD().compress(layer, rank=5, factor_bits=16)
    assert bool(torch.isfinite(packed.decode()).all())
    assert layer.distortion(packed.decode()) < 1e-4 * layer.distortion(torch.zeros_like(layer.weight))


def test_zero_metric_and_zero_weight_are_served():
    layer = random_layer(30, 8)
    layer.hessian.zero_()
    assert bool(torch.isfinite(LowRankSVD().compress(layer, rank=2).decode()).all())
    layer = random_layer(8, 30)
    layer.weight.zero_()
    assert bool((LowRankSVD().compress(layer, rank=2).decode() == 0).all())


def test_right_factor_makes_up_for_the_rounding_of_the_left():
    layer = random_layer(48, 64)
    vectors, _ = left_vectors(layer)
    layer.row_weight[:] = 1.0
    best = layer.distortion(LowRankSVD().compress(layer, rank=8, factor_bits=16).decode())
    coarse = layer.distortion(LowRankSVD().compress(layer, rank=8, factor_bits=4).decode())
    assert best < coarse < 1.1 * best
    assert vectors.shape == (48, 48)


def test_shared_decomposition_gives_the_same_bytes():
    layer = random_layer(70, 80)
    compressor = LowRankSVD()
    for candidate in compressor.candidates(layer):
        again = compressor.compress(layer, **candidate.options)
        assert candidate.nbytes == again.nbytes
        assert candidate.distortion == layer.distortion(again.decode())


def test_what_it_cannot_do_it_says():
    grouped = random_layer(8, 6)
    grouped.hessian = grouped.hessian.repeat(2, 1, 1)
    assert LowRankSVD().offers(grouped) == []
    with pytest.raises(WeightError, match="grouped"):
        LowRankSVD().compress(grouped, rank=1)
    with pytest.raises(WeightError, match=r"layer\.weight: rank 7"):
        LowRankSVD().compress(random_layer(8, 6), rank=7)
