"""What every estimator owes. Runs for each one in the registry: a new one is tested by being registered."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pennyweight import registry
from pennyweight.errors import PlanError, UnknownNameError
from pennyweight.estimators import Estimator, make_estimator, sign

NAMES = [entry.name for entry in registry.methods("estimators")]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PROGRESS = [0.0, 0.37, 1.0]


def at(name: str, progress: float = 0.0) -> Estimator:
    estimator = make_estimator(name)
    estimator.progress.fill_(progress)
    return estimator


def values(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[6, 64]: a fine range around the windows, with both zeros, the extremes and the smallest magnitudes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 64, generator=generator, dtype=torch.float64)
    tiny = torch.finfo(dtype).tiny
    x[0, :10] = torch.tensor([0.0, -0.0, 1.0, -1.0, 100.0, -100.0, 0.5, -0.5, 1.5, -2.5])
    x[1], x[2, :2] = 0.0, torch.tensor([tiny, -tiny])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_step_and_the_gradient_the_surrogate(name, dtype):
    for progress in PROGRESS:
        estimator, x = at(name, progress), values(dtype).requires_grad_()
        y = estimator(x)
        assert y.dtype == dtype and y.shape == x.shape
        expected = x.round() if estimator.step == "round" else torch.where(x < 0, -1.0, 1.0)
        assert torch.equal(y, estimator.exact(x))
        if type(estimator).exact is Estimator.exact:
            assert torch.equal(y, expected.to(dtype))
        incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        (gradient,) = torch.autograd.grad(y, x, incoming)
        slope = estimator.surrogate(x.detach())
        assert slope.dtype == dtype and slope.shape == x.shape
        assert bool(torch.isfinite(slope).all()) and torch.equal(gradient, incoming * slope)
        with torch.no_grad():
            assert torch.equal(estimator(x), y)


@pytest.mark.parametrize("name", NAMES)
def test_zero_is_positive_and_nan_stays(name):
    estimator = at(name)
    y = estimator(torch.tensor([0.0, -0.0, math.nan]))
    assert y[:2].tolist() == ([1.0, 1.0] if estimator.step == "sign" else [0.0, 0.0])
    assert bool(y[2].isnan())


@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize("name", NAMES)
def test_surrogate_is_the_derivative_of_the_approximation(name, progress):
    """Against central differences in float64, away from the corners of piecewise approximations."""
    estimator, x, h = at(name, progress), values(), 1e-6
    # Autograd holds statistics of the tensor (a quantile) fixed, as the contract has it ...
    variable = x.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(estimator.approximation(variable).sum(), variable)
    slope = estimator.surrogate(x)
    neighbours = torch.stack([estimator.surrogate(x - h), estimator.surrogate(x + h)])
    smooth = ((neighbours - slope).abs() <= 1e-3 * (1 + slope.abs())).all(0) & (x != 0)
    assert smooth.sum() > 200
    torch.testing.assert_close(derivative[smooth], slope[smooth], rtol=1e-6, atol=1e-6)
    # ... and differences can be taken where there are none: where an element's value does not depend on the others.
    elementwise = torch.equal(estimator.approximation(x[:1]), estimator.approximation(x)[:1])
    if elementwise:
        difference = (estimator.approximation(x + h) - estimator.approximation(x - h)) / (2 * h)
        torch.testing.assert_close(difference[smooth], slope[smooth], rtol=1e-4, atol=1e-6)
    assert torch.equal(estimator.approximation(torch.zeros(3)), torch.zeros(3))
    torch.testing.assert_close(estimator.approximation(-x), -estimator.approximation(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_copies_checkpoints_and_gradients_of_an_old_progress(name):
    estimator, x = at(name, 0.5), values(torch.float32)
    twin, fresh = copy.deepcopy(estimator), make_estimator(name)
    assert "progress" in estimator.state_dict() and estimator.progress.dtype == torch.float32
    assert estimator.progress.shape == ()
    fresh.load_state_dict(estimator.state_dict())
    expected = estimator.surrogate(x)
    assert torch.equal(twin.surrogate(x), expected) and torch.equal(fresh.surrogate(x), expected)
    # The slope is that of the forward pass, whatever a schedule does between forward and backward.
    variable = x.clone().requires_grad_()
    y = estimator(variable)
    estimator.progress.fill_(1.0)
    assert torch.equal(torch.autograd.grad(y.sum(), variable)[0], expected)
    assert torch.equal(twin.progress, torch.tensor(0.5))


@pytest.mark.parametrize("name", NAMES)
def test_an_estimator_in_a_float64_network_works(name):
    network = nn.Sequential(nn.Linear(4, 4), make_estimator(name)).double()
    y = network(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    y.sum().backward()
    assert y.dtype == torch.float64
    gradient = next(network.parameters()).grad
    assert gradient is not None and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_setting_is_refused_by_name(name):
    with pytest.raises(PlanError, match="no setting 'colour'"):
        make_estimator(name, colour=1)


@settings(deadline=None, max_examples=60)
@given(st.floats(width=32, allow_nan=False))
def test_sign_has_two_values(value):
    assert sign(torch.tensor([value])).item() == (-1.0 if value < 0 else 1.0)


def test_an_unknown_name_lists_the_close_ones():
    with pytest.raises(UnknownNameError, match="reste"):
        make_estimator("restee")


def test_a_network_of_all_estimators_compiles_whole():
    estimators = nn.ModuleList(make_estimator(name) for name in NAMES)

    def together(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([estimator(x) for estimator in estimators]).sum(0)

    x = values(torch.float32).requires_grad_()
    y = torch.compile(together, fullgraph=True, backend="aot_eager")(x)
    expected = together(x)
    assert torch.equal(y, expected)
    (gradient,), (reference,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)
