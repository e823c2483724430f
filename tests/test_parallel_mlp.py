"""The parallel network: a sum of networks, the equivalence of weight decay and an l_{2/L} penalty, pruning."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pennyweight.models.parallel_mlp import ParallelMLP, parallel_mlp


def network(**options) -> ParallelMLP:
    torch.manual_seed(0)
    model = parallel_mlp(**({"inputs": 2, "outputs": 2, "subnetworks": 7, "width": 4, "depth": 4} | options)).double()
    with torch.no_grad():
        for bias in model.biases:
            bias.add_(torch.randn_like(bias) * 0.3)
    return model


X = torch.rand(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_a_sum_of_separate_networks(slope):
    model = network(slope=slope)
    total = torch.zeros(40, 2, dtype=torch.float64)
    for j in range(7):
        h = X
        for index in range(4):
            h = h @ model.weights[index][j] + model.biases[index].view(7, -1)[j]
            h = F.leaky_relu(h, slope) if index < 3 else h
        total += h
    assert torch.allclose(model(X), total)
    single = network(subnetworks=1)
    assert torch.allclose(single(X), single.subnetworks(X)[0])


def test_kinks_start_in_the_unit_interval():
    torch.manual_seed(0)
    model = ParallelMLP(1, 1, 50)
    kinks = -model.biases[0].view(50, -1) / model.weights[0][:, 0]
    assert bool(((kinks >= -1e-6) & (kinks <= 1 + 1e-6)).all()) and float(kinks.detach().std()) > 0.2


def test_functions_stay_and_the_penalty_changes_under_rescaling_and_order():
    model = network()
    y, penalty = model(X), model.penalty().item()
    with torch.no_grad():
        model.weights[1][3] *= 2
        model.biases[1].view(7, -1)[3] *= 2
        model.weights[2][3] /= 2
    assert torch.allclose(model(X), y) and float(model.penalty()) != pytest.approx(penalty)
    order = torch.randperm(7)
    with torch.no_grad():
        for parameter in model.parameters():
            rows = parameter.view(7, -1)
            rows.copy_(rows[order].clone())
    assert torch.allclose(model(X), y)


def test_balancing_reaches_the_floor_at_the_same_function():
    model = network(subnetworks=1)
    with torch.no_grad():
        for weight, norm in zip(model.weights, (3, 0.5, 2, 1)):
            weight.mul_(norm / weight.norm())
    assert float(model.penalty()) == pytest.approx(14.25)
    floor = 4 * math.sqrt(3)
    assert 4 * float(model.sparsity_norm()) == pytest.approx(floor) == pytest.approx(6.928203, abs=1e-6)
    y = model(X)
    model.balance()
    assert torch.allclose(model(X), y) and float(model.penalty()) == pytest.approx(floor)
    assert torch.allclose(model.norms(), torch.full((1, 4), 1.316074).double(), atol=1e-6)


def test_the_penalty_is_at_least_the_sparsity_norm():
    model = network()
    assert float(model.penalty()) > 4 * float(model.sparsity_norm())
    model.balance()
    assert float(model.penalty()) == pytest.approx(4 * float(model.sparsity_norm()))


def test_gradient_flow_conserves_differences():
    """Without decay |W^{l+1}|^2 - |W^l|^2 - |b^l|^2 stays, up to O(rate)."""
    y = (X[:, :1] - X[:, 1:]).expand(-1, 2)

    def invariant(model):
        squares = model.norms().square()
        shifts = torch.stack([b.view(7, -1).square().sum(1) for b in model.biases], 1)
        return (squares[:, 1:] - squares[:, :-1] - shifts[:, :-1]).detach()

    changes = []
    for rate in (4e-3, 2e-3):
        model = network()
        start = invariant(model)
        for _ in range(round(0.04 / rate)):
            gradients = torch.autograd.grad((model(X) - y).square().mean(), list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients):
                    parameter -= rate * gradient
        changes.append(float((invariant(model) - start).abs().max()))
    assert changes[1] < 0.6 * changes[0] and changes[0] < 0.05


def test_only_balanced_subnetworks_are_at_rest():
    """Along a rescaling the loss does not change and the penalty by 2 (|W^l|^2 - |W^{l+1}|^2): 0 where balanced."""
    model = network()
    y = (X[:, :1] - X[:, 1:]).expand(-1, 2)
    for balanced in (False, True):
        loss = (model(X) - y).square().mean() + 0.3 * model.penalty()
        loss_by = torch.autograd.grad(loss, [*model.weights, *model.biases])
        along = [(p * g).view(7, -1).sum(1) for p, g in zip([*model.weights, *model.biases], loss_by)]
        squares = model.norms().square()
        for index in range(3):
            derivative = along[index] + along[4 + index] - along[index + 1]
            expected = 0.6 * (squares[:, index] - squares[:, index + 1])
            assert torch.allclose(derivative, expected, atol=1e-9)
            assert bool((derivative.abs() < 1e-9).all()) == balanced
        model.balance()


def test_pruning():
    model = network(subnetworks=20)
    with torch.no_grad():
        for index in range(20):
            if index % 3:
                model.weights[3][index] *= 1e-5
    y = model(X)
    active = model.active(X, 1e-3)
    assert 0 < int(active.sum()) <= 7
    left = model.prune(X, 1e-3)
    assert left == int(active.sum()) == len(model.weights[0]) and len(list(model.parameters())) == 8
    assert float((model(X) - y).abs().max()) <= 20 * 1e-3
    with torch.no_grad():
        for weight in model.weights:
            weight.zero_()
    constant = model(X)
    assert model.prune(X) == 0 and torch.allclose(model(X), constant)


def test_a_large_decay_leaves_the_mean():
    model = network(subnetworks=10, depth=3, outputs=1)
    y = torch.sin(6 * X[:, :1])
    for _ in range(150):
        loss = (model(X) - y).square().mean() + 1.0 * model.penalty()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter -= 0.02 * gradient
    assert not bool(model.active(X).any())
    assert torch.allclose(model(X), y.mean().expand(40, 1), atol=1e-3)


def test_refusals():
    with pytest.raises(ValueError, match="2 layers"):
        ParallelMLP(1, depth=1)
