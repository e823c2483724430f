"""PSiLON's L1 weight normalisation: gradient, projection, the ramp to exact zeros, CReLU pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pennyweight as pw
from pennyweight.errors import PlanError, WeightError
from pennyweight.training.schedule import set_progress
from pennyweight.weights.psilon import L1WeightNorm, magnitude, near_sparsity, project, simplex_threshold


def rows(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def fitted(weight: torch.Tensor, progress: float = 0, **options) -> L1WeightNorm:
    transform = L1WeightNorm(**options)
    transform.fit(weight)
    set_progress(transform, progress)
    return transform


def test_values_and_gradient():
    v = rows(3, -1, 0).requires_grad_()
    transform = fitted(v.detach(), initial=2.0)
    w = transform(v)
    assert torch.equal(w, rows(1.5, -0.5, 0))
    w.sum().backward()
    assert torch.allclose(v.grad, rows(0.25, 0.75, 0.5)) and abs(float((v.grad * v.detach()).sum())) < 1e-12


@pytest.mark.parametrize("shared", [True, False])
def test_rows_have_the_learned_length(shared):
    torch.manual_seed(0)
    v = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    transform = fitted(v.detach(), shared=shared, initial=-0.7)
    w = transform(v)
    assert transform.length.shape == (() if shared else (5,))
    assert torch.allclose(w.abs().sum(1), torch.full((5,), 0.7, dtype=torch.float64))
    assert torch.allclose(transform(3.7 * v), w)
    assert torch.autograd.gradcheck(transform, v)
    (w * torch.randn_like(w)).sum().backward()
    assert float((v.grad * v.detach()).sum(1).abs().max()) < 1e-12


def test_the_weights_own_length():
    torch.manual_seed(0)
    v = torch.randn(5, 7)
    assert torch.allclose(fitted(v, shared=False, initial=None)(v), v)
    assert fitted(v, initial=None).length.item() == pytest.approx(float(v.abs().sum(1).mean()))


def test_projection_values():
    v = rows(2, -1, 0.5, 0.1)
    assert torch.allclose(project(v), rows(1, 0, 0, 0)) and float(simplex_threshold(v.abs())) == pytest.approx(1)
    v = rows(0.5, -0.3, 0.1, 0.05)
    assert torch.allclose(project(v), rows(0.5125, -0.3125, 0.1125, 0.0625))
    assert float(simplex_threshold(v.abs())) == pytest.approx(-0.0125)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_projection_is_the_nearest_point_of_the_simplex(values):
    v = torch.tensor([values], dtype=torch.float64)
    p = project(v)
    if bool((v != 0).all()):
        assert float(p.abs().sum()) == pytest.approx(1, abs=1e-9)
    size, low, high = v.abs(), float(v.abs().min()) - 1, float(v.abs().max())
    for _ in range(80):  # tau by bisection
        middle = (low + high) / 2
        low, high = (middle, high) if float((size - middle).relu().sum()) > 1 else (low, middle)
    assert torch.allclose(p.abs(), torch.where(v == 0, 0.0, (size - low).relu()), atol=1e-9)


def test_near_sparsity():
    assert near_sparsity(rows(1, -1, 1, 1)).item() == pytest.approx(0, abs=1e-12)
    assert near_sparsity(rows(0, 0, 2, 0)).item() == pytest.approx(0.75)
    assert near_sparsity(rows(3, -1, 0, 0)).item() == pytest.approx(0.561309, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"sharpness": 3.0}, {"pairs": True}])
def test_the_ramp_leads_to_exact_zeros(options):
    torch.manual_seed(0)
    v = torch.randn(6, 40, dtype=torch.float64)
    transform = fitted(v, sparsify=0.5, initial=0.8, **options)
    dense = transform(v)
    for progress in (0.0, 0.3, 0.5):
        set_progress(transform, progress)
        assert torch.equal(transform(v), dense)
    last = dense
    for progress in (0.6, 0.75, 1.0):
        set_progress(transform, progress)
        last = transform(v)
        pairs = options.get("pairs", False)
        assert torch.allclose(magnitude(last, pairs).sum(1), torch.full((6,), 0.8, dtype=torch.float64))
        assert torch.equal(transform(v), last)  # looking does not move it
        assert bool((last == 0).any()) == (progress == 1.0)
    assert float((last == 0).double().mean()) > 0.5
    assert bool((last.sign() * v.sign() >= 0).all())
    keep = project(v * (options["sharpness"] / v.abs().sum(1, keepdim=True)) if "sharpness" in options else v, pairs)
    assert torch.allclose(last, 0.8 * keep)
    assert torch.autograd.gradcheck(transform, v.requires_grad_())


def test_short_rows_gain_no_weights_where_there_are_none():
    v = rows(0.2, -0.1, 0, 0)
    transform = fitted(v, 1.0, sparsify=0.5)
    assert torch.allclose(transform(v), rows(2 / 3, -1 / 3, 0, 0))


def test_rows_of_zeros_are_zeros_with_a_gradient():
    v = torch.zeros(2, 3, requires_grad=True)
    transform = fitted(torch.ones(2, 3), 1.0, sparsify=0.5)
    transform(v).sum().backward()
    assert torch.equal(transform(v), torch.zeros(2, 3)) and bool(v.grad.isfinite().all())


def test_pairs_share_norm_and_threshold():
    v = rows(2, -1, 0.5, 3)  # pairs (2, 0.5) and (-1, 3)
    transform = fitted(v, pairs=True)
    assert torch.allclose(transform(v), v / 5)
    set_progress(transform, 1)
    assert torch.equal(project(v, pairs=True) != 0, torch.tensor([[False, False, False, True]]) | (v.abs() > 2))
    with pytest.raises(WeightError, match="even"):
        fitted(torch.ones(2, 3), pairs=True)


def test_a_trained_layer_folds_to_exact_zeros_and_chains_with_low_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 1))
    rule = {"match": "2", "weight": {"method": "psilon", "sparsify": 0.6, "initial": None}}
    pw.prepare(model, {"rules": [rule]})
    x = torch.randn(64, 20)
    y = x[:, :1] - x[:, 1:2]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(60):
        set_progress(model, (step + 1) / 60)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    length = model[2].parametrizations.weight[0].length.item()
    before = model.eval()(x)
    pw.fold(model)
    assert torch.allclose(model(x), before, atol=1e-6) and type(model[2]) is nn.Linear
    assert float((model[2].weight == 0).float().mean()) > 0.5
    assert torch.allclose(model[2].weight.abs().sum(1), torch.full((30,), abs(length)), atol=1e-5)
    low = pw.prepare(model, {"rules": [{"match": "2", "weight": ["psilon", {"method": "lsq", "bits": 4}]}]}).eval()
    expected = low(x)
    assert torch.allclose(pw.convert(low)(x), expected, atol=1e-5)


def test_refusals():
    for options in ({"sparsify": 1.0}, {"sparsify": -0.1}, {"sharpness": 0.5}):
        with pytest.raises(PlanError):
            L1WeightNorm(**options)
    with pytest.raises(WeightError, match="fit"):
        L1WeightNorm()(torch.ones(2, 2))
