"""Weight compander: the card's values, bounds, inverses, limits, and the network that stays as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import pennyweight as pw
from pennyweight.errors import PlanError, WeightError
from pennyweight.weights.weight_compander import CURVES, WeightCompander, compand, expand

curves = pytest.mark.parametrize("curve", CURVES)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_values_and_slopes():
    v = tensor(0, 0.1, 0.5, 1, 2, 10).requires_grad_()
    w = compand(v, 2.0, 1.0)
    assert torch.allclose(w, tensor(0, 0.199337, 0.927295, 1.570796, 2.214297, 2.942255), atol=1e-6)
    w.sum().backward()
    assert torch.allclose(v.grad, tensor(2, 1.980198, 1.6, 1, 0.4, 0.019802), atol=1e-6)


def test_gradients_of_the_shape():
    a, b = tensor(2).requires_grad_(), tensor(1).requires_grad_()
    compand(tensor(0.5), a, b).backward()
    assert float(a.grad) == pytest.approx(0.463648, abs=1e-6) and float(b.grad) == pytest.approx(-0.8)


@curves
def test_gradcheck(curve):
    inputs = [t.requires_grad_() for t in (tensor(-2, -0.3, 0.4, 5), tensor(2), tensor(0.7))]
    assert torch.autograd.gradcheck(lambda v, a, b: compand(v, a, b, curve), inputs)


@curves
def test_bounded_odd_and_of_the_same_order(curve):
    v = torch.cat([torch.logspace(-6, 30, 200), torch.zeros(1)])
    v = torch.cat([-v, v]).sort().values
    w = compand(v, 1.5, 1.0, curve)
    assert float(w.abs().max()) <= 1.5 * CURVES[curve].bound * (1 + 1e-6)
    assert torch.equal(w, -w.flip(0)) and torch.equal(w.sign(), v.sign())
    near = v.abs() < 3
    assert bool((w[near].unique().diff() > 0).all()) and bool((w.diff() >= 0).all())


@curves
@settings(deadline=None, max_examples=30)
@given(a=st.floats(0.1, 10), ratio=st.floats(1, 4), share=st.floats(-0.94, 0.94))
def test_inverse(curve, a, ratio, share):
    w = tensor(share * a * CURVES[curve].bound)
    assert torch.allclose(compand(expand(w, a, a / ratio, curve), a, a / ratio, curve), w, rtol=1e-9, atol=1e-12)


def test_crossover_in_units_of_the_width():
    for ratio, v in ((1.5, 1.4511), (2, 2.3311), (4 / math.pi, 1.0)):
        assert float(compand(tensor(v), ratio, 1.0)) == pytest.approx(v, abs=1e-4)


def test_one_step_of_gradient_descent():
    compander = WeightCompander(2, 1, units="absolute")
    v = torch.tensor([0.5], requires_grad=True)
    compander(v).sum().backward()
    with torch.no_grad():
        v -= 0.1 * v.grad
    assert v.item() == pytest.approx(0.34, abs=1e-6) and compander(v).item() == pytest.approx(0.655477, abs=1e-6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_preparing_leaves_the_network_and_chains_as_they_were():
    x = torch.randn(5, 4)
    for chain in ("weight-compander", ["weight-compander", "weight-standardization"]):
        plain, made = net(), pw.prepare(net(), {"rules": [{"match": "2", "weight": chain}]})
        if isinstance(chain, list):
            pw.prepare(plain, {"rules": [{"match": "2", "weight": chain[1:]}]})
        assert torch.allclose(made(x), plain(x), rtol=1e-4, atol=1e-6)
    low = pw.prepare(
        net(), {"rules": [{"match": "2", "weight": ["weight-compander", {"method": "statsq", "bits": 3}]}]}
    )
    assert low[2].weight.unique().numel() > 2
    low.eval()
    y = low(x)
    assert torch.allclose(pw.convert(low)(x), y, atol=1e-5)


def test_a_wide_curve_is_no_curve():
    """a = b = 1000: training goes as it goes without."""
    plain, made = net(), net()
    for i in (0, 2, 4):
        parametrize.register_parametrization(made[i], "weight", WeightCompander(1e3, 1e3, units="absolute"))
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    for model in (plain, made):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    for i in (0, 2, 4):
        assert torch.allclose(made[i].weight, plain[i].weight, atol=1e-5)


def test_weights_stay_in_bounds_and_saturated_ones_come_back_by_decay():
    made = pw.prepare(net(), {"rules": [{"match": "2", "weight": "weight-compander"}]})
    compander = made[2].parametrizations.weight[0]
    bound = 1.5 * float(compander.unit) * math.pi / 2
    optimizer = torch.optim.SGD(made.parameters(), 3.0)
    for _ in range(20):
        optimizer.zero_grad()
        (-made[2].weight.abs().sum()).backward()
        optimizer.step()
        assert float(made[2].weight.detach().abs().max()) <= bound * (1 + 1e-6)


def test_removing_and_folding_keep_the_outputs(tmp_path):
    x = torch.randn(5, 4)
    made = pw.prepare(net(), {"rules": [{"match": "2", "weight": {"method": "weight-compander", "learn": True}}]})
    y, weight = made(x), made[2].weight.detach().clone()
    first = pw.fold(copy.deepcopy(made))
    assert torch.equal(made(x), y) and torch.allclose(first(x), y, atol=1e-6)
    folded = pw.fold(copy.deepcopy(made))  # copies share no class
    parametrize.remove_parametrizations(made[2], "weight")
    assert torch.equal(made(x), y)
    assert torch.equal(folded[2].weight, weight) and torch.allclose(folded(x), y, atol=1e-6)
    assert type(folded[2]) is nn.Linear and isinstance(folded[2].weight, nn.Parameter)
    assert folded.state_dict().keys() == net().state_dict().keys()
    pw.save(folded, tmp_path / "out")
    assert torch.allclose(pw.load(tmp_path / "out", net())(x), y, atol=1e-2)  # stored as float16
    with pytest.raises(PlanError, match="nothing to fold"):
        pw.fold(folded)


def test_folding_before_a_low_bit_transform_keeps_that_one():
    x = torch.randn(5, 4)
    rule = {"match": "2", "weight": ["weight-compander", {"method": "lsq", "bits": 4}]}
    made = pw.prepare(net(), {"rules": [rule]}).eval()
    y, latent = made(x), made[2].parametrizations.weight[0](made[2].parametrizations.weight.original)
    folded = pw.fold(made)
    assert torch.equal(folded(x), y) and torch.equal(folded[2].parametrizations.weight.original, latent)
    assert torch.allclose(pw.convert(folded)(x), y, atol=1e-5)


def test_learned_shape():
    compander = WeightCompander(1.5, 0.5, learn=True)
    compander.fit(torch.full((2, 3), 2.0))
    a, b = compander.curve_shape()
    assert (a.item(), b.item()) == pytest.approx((3, 1), rel=1e-5)
    with torch.no_grad():
        compander.shape.fill_(-1e4)  # as far as it can be driven
    assert all(value.item() > 0 for value in compander.curve_shape())
    v = torch.randn(2, 3, requires_grad=True)
    WeightCompander(1.5, 0.5, learn=True)(v).sum().backward()
    with torch.no_grad():
        compander.shape.copy_(torch.tensor([1.0, 1.0]))
    compander(v).square().sum().backward()
    assert compander.shape.grad.abs().min() > 0


def test_refusals():
    for options in ({"a": 1, "b": 2}, {"b": 0}, {"curve": "sine"}, {"units": "metres"}, {"b": 1e-4, "learn": True}):
        with pytest.raises(PlanError):
            WeightCompander(**options)
    with pytest.raises(WeightError, match="zero"):
        WeightCompander().fit(torch.zeros(2, 2))
