"""Codebook: the objective never rises, the limits of K are exact, weights are honoured coordinate by coordinate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.compress import codebook
from pennyweight.compress.codebook import VectorQuantizer, blocks_of, training_blocks, weighted_kmeans
from pennyweight.compress.contract import LayerView
from pennyweight.errors import WeightError


def random_layer(rows: int, cols: int, seed: int = 0) -> LayerView:
    generator = torch.Generator().manual_seed(seed)
    column_weight = torch.rand(cols, generator=generator, dtype=torch.float64) + 0.05
    row_weight = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.05
    weight = torch.randn(rows, cols, generator=generator)
    return LayerView("layer.weight", weight, torch.diag(column_weight)[None], row_weight)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    d=st.integers(1, 8),
    entries=st.integers(1, 40),
    cols=st.integers(1, 30),
    rate=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_objective_never_rises(seed, d, entries, cols, rate):
    blocks = blocks_of(random_layer(20, cols, seed), d)
    centres, cost, history = weighted_kmeans(blocks, entries, rate, iterations=6)
    assert 1 <= len(centres) <= entries
    assert len(cost) == len(centres)
    scale = float((blocks.importance() * blocks.values.square()).sum())
    # the first assignment knows no lengths yet: with a rate its objective lacks their price
    for before, after in zip(history[bool(rate) :], history[bool(rate) + 1 :]):
        assert after <= before + 1e-6 * scale


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), d=st.integers(1, 8), entries=st.integers(1, 20))
def test_nearest_is_the_brute_force_argmin(seed, d, entries):
    blocks = blocks_of(random_layer(6, 19, seed), d)
    generator = torch.Generator().manual_seed(seed)
    centres, cost = torch.randn(entries, d, generator=generator), torch.rand(entries, generator=generator)
    error = (blocks.values[:, None] - centres).square() * blocks.importance()[:, None]
    objective = error.sum(-1) + cost
    chosen = objective.gather(1, blocks.nearest(centres, cost)[:, None])[:, 0]
    torch.testing.assert_close(chosen, objective.min(1).values, rtol=1e-4, atol=1e-5)


def test_one_entry_is_the_weighted_mean():
    layer = random_layer(12, 10)
    packed = VectorQuantizer().compress(layer, d=5, entries=1, row_scale=False)
    importance = (layer.row_weight[:, None] * layer.column_weight).float()
    blocks, weights = layer.weight.view(-1, 5), importance.view(-1, 5)
    mean = (blocks * weights).sum(0) / weights.sum(0)
    torch.testing.assert_close(packed.decode()[0, :5], mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("d", [1, 3, 4])
def test_as_many_entries_as_distinct_blocks_is_exact(d, row_scale):
    generator = torch.Generator().manual_seed(d)
    table = torch.randn(11, d, generator=generator)
    index = torch.randint(11, (40, 8), generator=generator)
    index[:, :] = (
        index[:1] if row_scale else index
    )  # equal rows have equal scales, so blocks stay distinct as they were
    layer = random_layer(40, 8 * d)
    layer.weight = table[index].flatten(1)
    packed = VectorQuantizer().compress(layer, d=d, entries=11, row_scale=row_scale)
    torch.testing.assert_close(packed.decode(), layer.weight, rtol=2e-3, atol=2e-3)


def test_rare_blocks_that_the_sample_lacks_are_still_exact(monkeypatch):
    monkeypatch.setattr(codebook, "_TRAINING_BLOCKS", 32)
    layer = random_layer(100, 8)
    layer.weight = torch.ones(100, 8)
    layer.weight[57, 4:] = -3.0
    packed = VectorQuantizer().compress(layer, d=4, entries=4, row_scale=False)
    torch.testing.assert_close(packed.decode(), layer.weight)


def test_a_coordinate_that_counts_for_nothing_does_not_choose():
    layer = random_layer(200, 2)
    layer.hessian = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))[None]
    layer.weight[:, 0] = torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0)
    layer.weight[:, 1] *= 100
    packed = VectorQuantizer().compress(layer, d=2, entries=2, row_scale=False)
    torch.testing.assert_close(packed.decode()[:, 0], layer.weight[:, 0], rtol=0.02, atol=0)


def test_rows_that_count_more_are_served_better():
    layer = random_layer(64, 64)
    layer.row_weight[:] = 1.0
    column_weight = layer.column_weight

    def error_of_eight() -> float:
        error = VectorQuantizer().compress(layer, d=4, entries=64).decode() - layer.weight
        return float((error[:8].square() * column_weight).sum())

    even = error_of_eight()
    layer.row_weight[:8] = 1000.0
    assert error_of_eight() < 0.6 * even  # 128 of the 1,024 blocks have the 64 entries for themselves


def test_rate_trades_bytes_for_distortion():
    layer = random_layer(128, 128)
    plain, thrifty = (VectorQuantizer().compress(layer, d=2, entries=64, rate=rate) for rate in (0.0, 0.3))
    assert thrifty.nbytes < 0.75 * plain.nbytes
    assert layer.distortion(thrifty.decode()) > layer.distortion(plain.decode())
    cheaper_codebook = VectorQuantizer().compress(layer, d=2, entries=8)
    assert thrifty.nbytes <= cheaper_codebook.nbytes
    assert layer.distortion(thrifty.decode()) < layer.distortion(cheaper_codebook.decode())


def test_sample_is_unbiased_and_covers_heavy_rows():
    layer = random_layer(500, 8)
    layer.row_weight[:] = 1.0
    layer.row_weight[:5] = 200.0
    blocks = blocks_of(layer, 4)
    sample = training_blocks(blocks, 300)
    assert len(sample) <= 300
    total = float((blocks.importance() * blocks.values.square()).sum())
    drawn = float((sample.importance() * sample.values.square()).sum())
    assert drawn == pytest.approx(total, rel=0.1)
    heavy = float(sample.row_weight.max())
    assert int((sample.row_weight == heavy).sum()) == 10  # all blocks of the five heavy rows


def test_row_scale_serves_rows_of_unequal_size():
    layer = random_layer(64, 64)
    layer.weight *= torch.logspace(-2, 1, 64)[:, None]
    layer.row_weight[:] = layer.weight.square().mean(1).double().reciprocal()
    scaled = layer.distortion(VectorQuantizer().compress(layer, d=2, entries=16).decode())
    raw = layer.distortion(VectorQuantizer().compress(layer, d=2, entries=16, row_scale=False).decode())
    assert scaled < 0.5 * raw


def test_zero_rows_columns_and_all_zero_weights():
    layer = random_layer(6, 9)
    layer.weight[2] = 0.0
    assert bool((VectorQuantizer().compress(layer, d=4, entries=4).decode()[2] == 0).all())
    layer.weight.zero_()
    layer.row_weight.zero_()
    assert bool((VectorQuantizer().compress(layer, d=4, entries=4).decode() == 0).all())


def test_same_input_same_bytes_and_nan_refused():
    layer = random_layer(30, 30)
    compressor = VectorQuantizer()
    assert (
        compressor.compress(layer, d=3, entries=20).to_bytes() == compressor.compress(layer, d=3, entries=20).to_bytes()
    )
    layer.weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"layer\.weight"):
        compressor.compress(layer)
