"""Weight standardization: the four spellings, the gradient, invariances, folding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.errors import PlanError
from pennyweight.weights.weight_standardization import WeightStandardization, standardise

torch.manual_seed(0)
W = torch.randn(6, 4, 3, 3, dtype=torch.float64)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize(
    "weight, unbiased, expected",
    [
        ((1, 2, 3, 4), False, (-1.341641, -0.447214, 0.447214, 1.341641)),
        ((1, 2, 3, 4), True, (-1.161895, -0.387298, 0.387298, 1.161895)),
        ((0, 0, 2, 2), False, (-1, -1, 1, 1)),
        ((0, 0, 2, 2), True, (-0.866025, -0.866025, 0.866025, 0.866025)),
    ],
)
def test_values(weight, unbiased, expected):
    assert torch.allclose(standardise(row(*weight), eps=1e-15, unbiased=unbiased), row(*expected), atol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_spellings(unbiased, inside):
    eps = 0.1  # large, so that its place shows
    rows = W.flatten(1)
    var = rows.var(1, keepdim=True, correction=int(unbiased))
    s = (var + eps).sqrt() if inside else var.sqrt() + eps
    expected = ((rows - rows.mean(1, keepdim=True)) / s).view_as(W)
    assert torch.allclose(WeightStandardization(eps, inside, unbiased)(W), expected)
    if inside and not unbiased:
        trick = F.batch_norm(W.view(1, len(W), -1), None, None, training=True, eps=eps).view_as(W)
        assert torch.allclose(WeightStandardization(eps, inside, unbiased)(W), trick, rtol=1e-6)


def test_gradient():
    weight = row(1, 2, 3, 4).requires_grad_()
    upstream = row(1, 0, 0, 0)
    (standardise(weight, 1e-15, unbiased=False) * upstream).sum().backward()
    assert torch.allclose(weight.grad, row(0.268328, -0.357771, -0.089443, 0.178885), atol=1e-6)
    assert abs(float(weight.grad.sum())) < 1e-9
    assert abs(float((weight.grad * (weight.detach() - 2.5)).sum())) < 1e-9
    for options in ((1e-3, True, True), (1e-3, False, False)):
        assert torch.autograd.gradcheck(lambda w, o=options: standardise(w, *o), W[:2, :2].clone().requires_grad_())


@pytest.mark.parametrize("unbiased", [True, False])
def test_invariances(unbiased):
    def made(weight):
        return standardise(weight, 1e-14, unbiased=unbiased)

    once = made(W)
    assert torch.allclose(made(-3 * W + 0.7), -once) and torch.allclose(made(0.01 * W - 5), once)
    assert torch.allclose(made(once), once)
    rows = once.flatten(1)
    assert float(rows.sum(1).abs().max()) < 1e-9
    assert torch.allclose(rows.square().sum(1), torch.full((6,), 36.0 - unbiased, dtype=torch.float64))


def test_gain_keeps_the_variance_through_relus():
    gain = math.sqrt(2 / (1 - 1 / math.pi))
    assert gain == pytest.approx(1.712859, abs=1e-6)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 300, generator=generator).relu()
    transform = WeightStandardization(gain=gain)
    for _ in range(12):
        x = (x @ transform(torch.randn(300, 300, generator=generator)).T).relu()
    assert 0.7 < float(x.square().mean()) / 0.5 < 1.4


def test_single_weights_stay_and_constant_filters_are_finite():
    depthwise = torch.randn(5, 1, 1, 1)
    assert torch.equal(WeightStandardization()(depthwise), depthwise)
    assert torch.equal(WeightStandardization()(torch.ones(2, 9)), torch.zeros(2, 9))


def test_folded_runs_as_trained_and_chains_with_signs():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 2)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    pw.prepare(model, {"rules": [{"match": "1", "weight": "weight-standardization"}]})
    y, weight = model(x), model[1].weight.detach().clone()
    pw.fold(model)
    assert torch.equal(model[1].weight, weight) and type(model[1]) is nn.Conv2d
    assert torch.allclose(model(x), y, atol=1e-6)
    pw.prepare(model, {"rules": [{"match": "1", "weight": ["weight-standardization", "binary"]}]})
    signs = model[1].weight.detach().sign()
    rows = weight.flatten(1)
    assert torch.equal(signs.flatten(1), (rows - rows.mean(1, keepdim=True)).sign())  # signs of centred weights


def test_group_norm_behind_it_does_not_see_the_batch():
    """Gradients of a batch are the mean of those of its samples: batch norm's are not."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 6, 6), torch.randn(8, 4)

    def gradients(norm: nn.Module, parts: list[slice]) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        nn.utils.parametrize.register_parametrization(model[0], "weight", WeightStandardization())
        for part in parts:
            ((model(x[part]) - y[part]).square().mean() / len(parts)).backward()
        return [p.grad for p in model.parameters()]

    whole, single = [slice(0, 8)], [slice(i, i + 1) for i in range(8)]
    for a, b in zip(gradients(nn.GroupNorm(2, 4), whole), gradients(nn.GroupNorm(2, 4), single)):
        assert torch.allclose(a, b, atol=1e-6)
    batch = zip(gradients(nn.BatchNorm2d(4), whole), gradients(nn.BatchNorm2d(4), single))
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in batch)


def test_refusals():
    with pytest.raises(PlanError, match="eps"):
        WeightStandardization(eps=0)
