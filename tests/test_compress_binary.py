"""Binary: the scale is the closed-form optimum, whatever the weights of the columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.compress.binary import BinaryScales, weighted_scale
from pennyweight.compress.contract import LayerView
from pennyweight.errors import WeightError
from pennyweight.formats import Binary


def layer_of(weight: torch.Tensor, column_weight: torch.Tensor) -> LayerView:
    hessian = torch.diag(column_weight.double())[None]
    return LayerView("layer.weight", weight, hessian, torch.ones(weight.shape[0], dtype=torch.float64))


def test_worked_example():
    weight = torch.tensor([[1.0, -3.0, 0.0, 2.0]])
    scale = weighted_scale(weight, torch.tensor([1.0, 1.0, 2.0, 0.0]), 4)
    torch.testing.assert_close(scale, torch.tensor([[1.0]]))  # (1*1 + 1*3 + 2*0 + 0*2) / 4
    packed = BinaryScales().compress(layer_of(weight, torch.tensor([1.0, 1.0, 2.0, 0.0])), group=0)
    torch.testing.assert_close(packed.decode(), torch.tensor([[1.0, -1.0, 1.0, 1.0]]))  # sign(0) is +


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), cols=st.integers(1, 50), group=st.sampled_from([0, 3, 16, 32]))
def test_no_other_scale_loses_less(seed, cols, group):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, cols, generator=generator)
    column_weight = torch.rand(cols, generator=generator) + 0.01
    size = group or cols
    scale = weighted_scale(weight, column_weight, size)
    spread = [scale.repeat_interleave(size, 1)[:, :cols] * factor for factor in (0.99, 1.0, 1.01)]
    below, best, above = (((weight.sign() * s - weight).square() * column_weight).sum(1) for s in spread)
    assert bool((best <= below).all() and (best <= above).all())


def test_equal_columns_give_the_plain_mean():
    weight = torch.randn(7, 45, generator=torch.Generator().manual_seed(0))
    packed = BinaryScales().compress(layer_of(weight, torch.full((45,), 2.5)), group=16)
    torch.testing.assert_close(packed.decode(), Binary.encode(weight, 16).decode())


def test_columns_without_weight_fall_back_to_the_plain_mean():
    weight = torch.tensor([[1.0, 3.0, -5.0, 7.0, 9.0]])
    scale = weighted_scale(weight, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), 2)
    torch.testing.assert_close(scale, torch.tensor([[2.0, 6.0, 9.0]]))


def test_signs_times_scale_come_back_exactly():
    signs = torch.where(torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    weight = signs * torch.tensor([0.5, 0.25, 2.0, 1.0])[:, None]
    packed = BinaryScales().compress(layer_of(weight, torch.rand(64) + 0.1), group=0)
    torch.testing.assert_close(packed.decode(), weight, rtol=2**-11, atol=0)


def test_nan_is_refused_by_name():
    with pytest.raises(WeightError, match=r"layer\.weight"):
        BinaryScales().compress(layer_of(torch.full((1, 2), torch.nan), torch.ones(2)))
