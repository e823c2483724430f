"""p-norm penalties: values, gradients and their bound, limits, what is penalised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pennyweight.errors import PlanError
from pennyweight.losses.p_norm import PNormPenalty, p_norm_penalty

W = torch.tensor([[3.0, -4.0], [0.0, 0.5]], dtype=torch.float64)


def test_known_values():
    assert p_norm_penalty(W, 2).item() == 25.25 and p_norm_penalty(W, 1).item() == 7.5
    assert p_norm_penalty(W, 0.5).item() == pytest.approx(3**0.5 + 2 + 0.5**0.5)
    assert p_norm_penalty(W, 0.5, 1e-9).item() == pytest.approx(p_norm_penalty(W, 0.5).item(), abs=1e-3)
    assert p_norm_penalty(0 * W, 0.4, 0.1).item() == 0


@settings(deadline=None, max_examples=25)
@given(p=st.floats(0.2, 2.5), eps=st.floats(0.05, 1))
def test_gradients(p, eps):
    assert torch.autograd.gradcheck(lambda w: p_norm_penalty(w, p, eps), W.clone().requires_grad_())


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
def test_eps_bounds_the_gradient_where_the_docstring_says(p):
    eps = 0.01
    w = torch.linspace(-1, 1, 2_000_001, dtype=torch.float64).requires_grad_()
    p_norm_penalty(w, p, eps).backward()
    bound = p * eps ** (p - 1) * (1 - p) ** ((1 - p) / 2) / (2 - p) ** ((2 - p) / 2)
    assert float(w.grad.abs().max()) == pytest.approx(bound, rel=1e-4)


def test_p_of_two_is_coupled_weight_decay():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    x = torch.randn(5, 3)
    for layer, decay in ((a, 0.02), (b, 0.0)):
        optimizer = torch.optim.SGD(
            [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}], lr=0.1
        )
        for _ in range(4):
            optimizer.zero_grad()
            (layer(x).square().mean() + (0 if decay else PNormPenalty(2, 0.01)(layer))).backward()
            optimizer.step()
    assert torch.allclose(a.weight, b.weight, atol=1e-6) and torch.allclose(a.bias, b.bias, atol=1e-6)


def test_what_is_penalised():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    total = sum(m.weight.abs().sum() for m in (model[0], model[2]))
    assert torch.allclose(PNormPenalty(1, 2.0)(model), 2 * total)
    assert torch.allclose(PNormPenalty(1, 1, ["2.*"])(model), model[2].weight.abs().sum() + model[2].bias.abs().sum())
    with pytest.raises(PlanError, match="no parameter matches"):
        PNormPenalty(1, 1, ["head.*"])(model)
    with pytest.raises(PlanError, match="two axes"):
        PNormPenalty(1, 1)(nn.BatchNorm1d(3))


def test_refusals():
    for options in ({"p": 0, "strength": 1}, {"p": 1, "strength": -1}, {"p": 0.5, "strength": 1, "eps": 0}):
        with pytest.raises(PlanError):
            PNormPenalty(**options)
