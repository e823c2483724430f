"""RD-Prune: the worked examples, the dynamic program against brute force, additivity, and a model left as it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pennyweight.compress.contract import LayerView
from pennyweight.compress.rd_prune import (
    MagnitudePruning,
    allocate,
    choose_amounts,
    layer_curve,
    magnitude_mask,
    model_curves,
    output_distortion,
    prunable,
    removed_count,
)
from pennyweight.errors import BudgetError, DataError, UnknownNameError, WeightError

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(75, 5),
    )
    return net.train()


def images(count: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- masks


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 8), cols=st.integers(1, 8), ties=st.booleans())
def test_masks_remove_the_least_and_are_nested(seed, rows, cols, ties):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    weight = weight.round() if ties else weight
    before = torch.ones(rows, cols, dtype=torch.bool)
    for amount in (0.0, 0.1, 0.35, 0.6, 0.9, 1.0):
        mask = magnitude_mask(weight, amount)
        assert int((~mask).sum()) == removed_count(weight.numel(), amount)
        assert bool((mask <= before).all())
        if bool(mask.any()) and not bool(mask.all()):
            assert float(weight[~mask].abs().max()) <= float(weight[mask].abs().min())
        before = mask


def test_counts_are_not_fooled_by_binary_fractions():
    assert [removed_count(100, step / 100) for step in range(101)] == list(range(101))


# ---------------------------------------------------------------- the choice


def choose(sizes, curves, grid, keep, **options):
    weights = {str(i): torch.arange(1.0, n + 1).view(1, -1) for i, n in enumerate(sizes)}
    named = {str(i): curve for i, curve in enumerate(curves)}
    return choose_amounts(weights, named, 1 - keep / sum(sizes), grid, **options)


def test_worked_examples():
    grid = (0.0, 0.5, 1.0)
    assert choose((4, 8), [(0, 1, 10), (0, 2, 5)], grid, keep=6) == {"0": 0.5, "1": 0.5}
    assert choose((4, 8), [(0, 1, 10), (0, 6, 6.5)], grid, keep=6) == {"0": 0.0, "1": 1.0}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_equals_brute_force_for_every_budget(seed):
    generator = torch.Generator().manual_seed(seed)
    grid, sizes = (0.0, 0.3, 0.7, 1.0), torch.randint(1, 9, (3,), generator=generator).tolist()
    curves = [[0.0, *torch.rand(3, generator=generator).tolist()] for _ in sizes]  # not monotone
    values = []
    for keep in range(sum(sizes) + 1):
        amounts = choose(sizes, curves, grid, keep)
        found = sum(curve[grid.index(amounts[str(i)])] for i, curve in enumerate(curves))
        feasible = [
            sum(curve[j] for curve, j in zip(curves, pick))
            for pick in itertools.product(range(4), repeat=3)
            if sum(n - removed_count(n, grid[j]) for n, j in zip(sizes, pick)) <= keep
        ]
        assert found == pytest.approx(min(feasible), abs=1e-12)
        backwards = choose(sizes[::-1], curves[::-1], grid, keep)
        assert sum(c[grid.index(backwards[str(2 - i)])] for i, c in enumerate(curves)) == pytest.approx(found)
        values.append(found)
    assert values == sorted(values, reverse=True)  # more sparsity never costs less


def test_amounts_only_grow_and_impossible_wishes_raise():
    curves = [(0, 1, 10), (0, 2, 5)]
    grown = choose((4, 8), curves, (0.0, 0.5, 1.0), keep=6, previous={"0": 0.0, "1": 1.0})
    assert grown["1"] == 1.0
    with pytest.raises(BudgetError, match="out of reach"):
        choose((4, 8), curves, (0.0, 0.5), keep=5)
    with pytest.raises(BudgetError, match="out of reach"):
        choose((4, 8), curves, (0.0, 0.5, 1.0), keep=1, keep_one_per_row=True)


# ---------------------------------------------------------------- curves


def test_whitened_linear_layer_has_the_closed_form_curve():
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, -1.0], [0.5, 2.0]]))
    whitened = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # E[x x^T] = I exactly
    curve = model_curves(net, whitened, GRID)["weight"]
    assert curve == pytest.approx([0.0, 0.125, 0.625, 2.625, 7.125], abs=1e-6)
    layer = LayerView("weight", net.weight.detach(), torch.eye(2).double()[None], torch.full((2,), 0.5).double())
    assert layer_curve(layer, GRID) == pytest.approx(curve, abs=1e-6)


def test_layer_curve_uses_the_measure_that_the_view_brings():
    layer = LayerView("w", torch.tensor([[1.0, 2.0]]), torch.eye(2).double()[None], torch.ones(1).double())
    layer.measure = lambda decoded: 10.0 * float((decoded == 0).sum())
    assert layer_curve(layer, (0.0, 0.5, 1.0)) == [0.0, 10.0, 20.0]


def test_worst_form_is_the_largest_sample():
    reference, output = torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    assert output_distortion(reference, output, "mean") == pytest.approx(1.0)
    assert output_distortion(reference, output, "worst") == pytest.approx(2.0)


class Disjoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


def test_layers_with_disjoint_outputs_add_up_exactly():
    torch.manual_seed(0)
    net, x = Disjoint(), torch.randn(16, 4)
    curves = model_curves(net, x, GRID)
    reference = net(x).detach()
    with torch.no_grad():
        for layer in (net.a, net.b):
            layer.weight.mul_(magnitude_mask(layer.weight, 0.5))
        joint = output_distortion(reference, net(x))
    assert joint == pytest.approx(curves["a.weight"][2] + curves["b.weight"][2], rel=1e-5)


def test_measuring_leaves_no_trace():
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    curves = model_curves(net, [images(), images(seed=2)], GRID)
    assert all(curve[0] == 0.0 and max(curve) > 0 for curve in curves.values())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert curves == model_curves(net, [images(), images(seed=2)], GRID)  # dropout is off, too


def test_weights_come_back_when_the_forward_fails():
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    passes = itertools.count()

    def fail(*_):
        if next(passes) == 3:
            raise RuntimeError("lost")

    net[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="lost"):
        model_curves(net, images(), GRID)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# ---------------------------------------------------------------- the whole method


@pytest.mark.parametrize("form", ["mean", "worst"])
def test_allocation_meets_the_sparsity_and_rounds_are_nested(form):
    net = small_net()
    weights = {site.name: site.matrix() for site in prunable(net)}
    total, previous, last_kept = sum(w.numel() for w in weights.values()), None, None
    for sparsity in (0.3, 0.6, 0.8):
        amounts = allocate(net, images(), sparsity, GRID, form, previous=previous)
        masks = {name: magnitude_mask(weights[name], amount) for name, amount in amounts.items()}
        assert sum(int(mask.sum()) for mask in masks.values()) <= (1 - sparsity) * total
        if last_kept is not None:
            assert all(bool((masks[name] <= last_kept[name]).all()) for name in masks)
        previous, last_kept = amounts, masks


def test_noise_mode_never_reads_the_data():
    class Untouchable:
        def __iter__(self):
            raise AssertionError("the data was read")

    net = small_net()
    amounts = allocate(net, Untouchable(), 0.5, GRID, calibration="noise", input_shape=(8, 2, 4, 4))
    assert amounts == allocate(net, None, 0.5, GRID, calibration="noise", input_shape=(8, 2, 4, 4))
    with pytest.raises(DataError, match="input_shape"):
        allocate(net, None, 0.5, GRID, calibration="noise")


def test_every_output_keeps_a_weight_when_asked():
    net = small_net()
    amounts = allocate(net, images(), 0.55, GRID, keep_one_per_row=True)
    for site in prunable(net):
        assert bool(magnitude_mask(site.matrix(), amounts[site.name]).any(1).all())


def test_exclusion_and_tied_weights():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert [site.name for site in prunable(net)] == ["0.weight", "2.weight"]
    assert set(allocate(net, torch.randn(4, 3), 0.5, GRID, exclude=["1.weight"])) == {"2.weight"}
    with pytest.raises(UnknownNameError, match=r"2\.weigth.*2\.weight"):
        prunable(net, ["2.weigth"])


def test_empty_or_broken_calibration_is_refused():
    with pytest.raises(DataError, match="empty"):
        allocate(small_net(), [], 0.5, GRID)
    net = small_net()
    with torch.no_grad():
        net[-1].bias.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        allocate(net, images(), 0.5, GRID)


# ---------------------------------------------------------------- the compressor


def test_pruned_layer_decodes_to_the_masked_weight():
    weight = torch.randn(9, 17, generator=torch.Generator().manual_seed(0))
    layer = LayerView("layer.weight", weight, torch.eye(17).double()[None], torch.ones(9).double())
    packed = MagnitudePruning().compress(layer, amount=0.6, value_bits=16)
    mask = magnitude_mask(weight, 0.6)
    torch.testing.assert_close(packed.decode(), weight * mask, rtol=2**-11, atol=1e-7)
    assert layer.distortion(packed.decode()) == pytest.approx(float(weight[~mask].square().sum()), rel=1e-4)
    whole = MagnitudePruning().compress(layer, amount=1.0)
    assert bool((whole.decode() == 0).all())
    with pytest.raises(WeightError, match=r"layer\.weight: a pruning amount"):
        MagnitudePruning().compress(layer, amount=1.5)
