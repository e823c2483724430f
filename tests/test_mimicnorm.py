"""MimicNorm: centring, moments and correlations, the last norm's bounds, conversion of ResNets, folding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import pennyweight as pw
from pennyweight.errors import PlanError
from pennyweight.layers.mimicnorm import NormalisedLogits, mimicnorm
from pennyweight.layers.norm_free import NORMS, ScaledOutput, read_graph
from pennyweight.models.resnet_cifar import resnet18_cifar, resnet20
from pennyweight.weights.weight_mean import WeightMean


def test_centring():
    centre = WeightMean()
    weight = torch.tensor([[1.0, 2, 3], [0, 0, 3]])
    once = centre(weight)
    assert torch.equal(once, torch.tensor([[-1.0, 0, 1], [-1, -1, 2]])) and torch.equal(centre(once), once)


def test_centred_filters_do_not_see_a_constant():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, 3).double()
    parametrize.register_parametrization(conv, "weight", WeightMean())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(conv(x + 3.7), conv(x))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_centring_after_each_step_is_the_same_for_sgd_only(kind):
    torch.manual_seed(0)
    start, x, y = torch.randn(3, 6).double(), torch.randn(20, 6).double(), torch.randn(20, 3).double()
    start -= start.mean(1, keepdim=True)
    found = []
    for after in (True, False):
        layer = nn.Linear(6, 3, bias=False).double()
        layer.weight.data.copy_(start)
        if not after:
            parametrize.register_parametrization(layer, "weight", WeightMean())
        parameters = list(layer.parameters())
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind]
        optimizer = make(parameters, 0.05, weight_decay=0.01, **({"momentum": 0.9} if kind == "sgd" else {}))
        for _ in range(8):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
            if after:
                layer.weight.data -= layer.weight.data.mean(1, keepdim=True)
        assert float(layer.weight.detach().sum(1).abs().max()) < 1e-12
        found.append(layer.weight.detach().clone())
    assert torch.allclose(*found, atol=1e-10) == (kind == "sgd")


def correlation_map(rho: float) -> float:
    return (math.sqrt(1 - rho * rho) + rho * (math.pi - math.acos(rho))) / (2 * math.pi)


def test_variance_that_a_centred_filter_sees_and_correlations():
    """The gain 1 / (1 - 1/pi), and correlations of straight and centred random ReLU layers, against simulation."""
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    mean, second = (torch.trapezoid(x.relu() ** k * density, x) for k in (1, 2))
    assert float(second - mean**2) == pytest.approx(0.5 * (1 - 1 / math.pi), abs=1e-6)
    assert 1 / (1 - 1 / math.pi) == pytest.approx(1.466942, abs=1e-6)
    rho, straight = 0.1, []
    for _ in range(6):
        rho = correlation_map(rho) / correlation_map(1)
        straight.append(rho)
    assert straight == pytest.approx([0.370, 0.525, 0.626, 0.696, 0.747, 0.786], abs=1e-3)
    rho, centred = 0.9, []
    for _ in range(6):
        rho = (correlation_map(rho) - correlation_map(0)) / (correlation_map(1) - correlation_map(0))
        centred.append(rho)
    assert centred == pytest.approx([0.867, 0.827, 0.778, 0.721, 0.656, 0.586], abs=1e-3)


@pytest.mark.parametrize(
    "centred, gain, low, high", [(False, 2.0, 0, math.inf), (True, 2.0, 0.001, 0.02), (True, 2.8, 0.3, 2)]
)
def test_deep_random_nets(centred, gain, low, high):
    generator = torch.Generator().manual_seed(0)
    x, centre = torch.randn(2, 300, generator=generator), WeightMean()
    for _ in range(30):
        weight = torch.randn(300, 300, generator=generator) * math.sqrt(gain / 300)
        z = x @ (centre(weight) if centred else weight).T
        x = z.relu()
    correlation = float(F.cosine_similarity(z[0], z[1], dim=0))
    assert low < float(z.square().mean().sqrt()) < high
    assert (correlation > 0.9) == (not centred) and (abs(correlation) < 0.3) == centred


@pytest.mark.parametrize("classes, least", [(2, 0.12693), (10, 0.27844), (100, 0.0042647)])
def test_least_loss_behind_the_last_norm(classes, least):
    logits = 50 * torch.eye(classes).double() + torch.randn(
        classes, classes, generator=torch.Generator().manual_seed(0)
    )
    norm = nn.BatchNorm1d(classes, affine=False, eps=1e-14).double()
    labels = torch.arange(classes)
    z = norm(50 * torch.eye(classes).double())
    assert float(z.max()) == pytest.approx(math.sqrt(classes - 1))
    assert float(F.cross_entropy(z, labels)) == pytest.approx(least, rel=1e-4)
    root = math.sqrt(classes - 1)
    bound = math.log1p((classes - 1) * math.exp(-root - 1 / root))
    assert float(F.cross_entropy(norm(logits), labels)) >= bound - 1e-12
    assert torch.allclose(norm(7 * logits), norm(logits))  # and the gradient is 7 times smaller
    gradients = [torch.autograd.grad(F.cross_entropy(norm(x), labels), x)[0] for x in _leaves(logits, 7 * logits)]
    assert torch.allclose(gradients[0], 7 * gradients[1], atol=1e-12)


def _leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def test_residual_sums_of_a_resnet():
    found = read_graph(resnet18_cifar(width=4)).sums
    assert [s.branch for s in found] == [f"layer{i}.{j}.conv2" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert [s.shortcut for s in found] == [
        None,
        None,
        *(n for i in (2, 3, 4) for n in (f"layer{i}.0.shortcut.0", None)),
    ]
    assert all(len(s.weighted) == 2 for s in found)
    assert len(read_graph(resnet20(width=4)).sums) == 9


def data(n: int = 32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4


@pytest.mark.parametrize("projection_scale", [1.0, 1.2])
def test_a_resnet_becomes_norm_free_by_one_call_trains_and_folds(projection_scale):
    torch.manual_seed(0)
    model = mimicnorm(resnet18_cifar(4, width=8), projection_scale=projection_scale)
    scales = [m for m in model.modules() if isinstance(m, ScaledOutput)]
    assert len(scales) == (8 if projection_scale == 1 else 11)
    branches = [float(model.get_submodule(f"layer{i}.{j}.conv2").scale.detach()) for i in (1, 2, 3, 4) for j in (0, 1)]
    assert branches == pytest.approx([1.44 / k for k in range(1, 9)])
    assert [n for n, m in model.named_modules() if isinstance(m, NORMS)] == ["linear.norm"]
    centred = [n for n, m in model.named_modules() if parametrize.is_parametrized(m, "weight")]
    assert "conv1" not in centred and "layer1.0.conv1" in centred and "linear.layer" not in centred
    assert ("layer4.0.shortcut.0" in centred or "layer4.0.shortcut.0.module" in centred) == (32 > 50)
    x, y = data()
    logits = model(x)
    assert torch.allclose(logits.mean(0), torch.zeros(4), atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = model.eval()(x)
    first = pw.fold(copy.deepcopy(model))
    assert torch.allclose(first(x), expected, atol=1e-5)
    assert not any(isinstance(m, (*NORMS, ScaledOutput, NormalisedLogits)) for m in first.modules())
    names = set(first.state_dict())
    assert {"layer1.0.conv2.weight", "linear.weight"} <= names and not any("module" in n for n in names)


def test_plain_nets_and_chains_with_signs():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    mimicnorm(model, centre=False)
    assert float(model[3].weight.detach().var()) == pytest.approx(2.8 / 72, rel=0.1)
    assert model[0].bias is not None and isinstance(model[1], nn.Identity)
    pw.prepare(model, {"rules": [{"match": "3", "weight": ["weight-mean", "binary"]}]})
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    expected = model.eval()(x)
    assert torch.allclose(pw.convert(model)(x), expected, atol=1e-4)


def test_refusals():
    with pytest.raises(PlanError, match="Linear"):
        mimicnorm(nn.Sequential(nn.Conv2d(3, 3, 3)))
    model = pw.prepare(resnet20(width=4), {"rules": [{"match": "layer1.*", "weight": "weight-mean"}]})
    with pytest.raises(PlanError, match="prepared"):
        mimicnorm(model)

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(PlanError, match="traced"):
        mimicnorm(Untraceable())
