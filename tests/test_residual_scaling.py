"""Residual scaling: the expansion term by term, growth with depth, conversion, folding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import PlanError
from pennyweight.layers.norm_free import NORMS, ScaledOutput
from pennyweight.layers.residual_scaling import ScaledResidual, expansion, residual_scale, scale_residuals
from pennyweight.models.resnet_cifar import resnet20


def test_linear_branches_are_the_sum_over_subsets():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(3, 3, dtype=torch.float64, generator=generator) for _ in range(5)]
    z = torch.randn(3, dtype=torch.float64, generator=generator)
    by_order = [torch.zeros_like(z) for _ in range(6)]
    for k in range(6):
        for subset in itertools.combinations(matrices, k):
            term = z
            for matrix in subset:
                term = matrix @ term
            by_order[k] += 0.3**k * term
    out = z
    for matrix in matrices:
        out = out + 0.3 * matrix @ out
    assert torch.allclose(out, sum(by_order), atol=1e-12)
    orders = expansion(z, [lambda x, m=m: m @ x for m in matrices], 0.3, lambda x: x)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(orders, by_order))


def scalar_net():
    t, b = (0.5, -1.0, 2.0), (0.1, 0.2, -0.3)
    return torch.tensor(0.7, dtype=torch.float64), [lambda x, t=t, b=b: torch.tanh(t * x + b) for t, b in zip(t, b)]


def run(z, branches, scale):
    for branch in branches:
        z = z + scale * branch(z)
    return float(z)


def test_scalar_example_and_rates_of_the_remainders():
    z, branches = scalar_net()
    orders = [float(o) for o in expansion(z, branches, 1.0, lambda x: x)]
    assert orders == pytest.approx([0.7, 0.760281, -0.360694], abs=1e-6)
    expected = {0.1: (-3.78e-3, -1.74e-4), 0.05: (-9.24e-4, -2.18e-5), 0.025: (-2.28e-4, -2.74e-6)}
    for scale, (first, second) in expected.items():
        base, one, two = (float(o) for o in expansion(z, branches, scale, lambda x: x))
        f = run(z, branches, scale)
        assert f - base - one == pytest.approx(first, rel=5e-3)
        assert f - base - one - two == pytest.approx(second, rel=5e-3)
    assert run(z, branches, 0.1) == pytest.approx(0.7722467, abs=1e-7)


def test_order_of_the_blocks_shows_in_the_second_term():
    z, branches = scalar_net()
    a, b = (expansion(z, order, 0.5, lambda x: x) for order in (branches, branches[::-1]))
    assert torch.allclose(a[1], b[1]) and not torch.allclose(a[2], b[2])
    assert float(expansion(z, branches[:1], 0.5, lambda x: x)[1]) == pytest.approx(run(z, branches[:1], 0.5) - 0.7)


def blocks(n: int, width: int, scale, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = []
    for _ in range(n):
        branch = nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False))
        nn.init.kaiming_normal_(branch[0].weight)
        nn.init.normal_(branch[2].weight, std=width**-0.5)
        made.append(ScaledResidual(branch, residual_scale(n, scale)))
    return nn.Sequential(*made)


@pytest.mark.parametrize("n", [10, 50, 200])
def test_growth_with_depth(n):
    width, x = 64, torch.randn(8, 64, generator=torch.Generator().manual_seed(1))

    def growth(scale) -> float:
        with torch.no_grad():
            return float((blocks(n, width, scale)(x).square().mean() / x.square().mean()).sqrt())

    assert growth(1.0) > 1.3**n
    assert growth("inv_sqrt") == pytest.approx(math.sqrt(math.e), rel=0.3)
    assert growth("inv") == pytest.approx(1, rel=0.15)
    assert growth(0.0) == 1


def test_gradients_mirror_the_forward_and_linear_growth_is_bounded():
    x = torch.randn(8, 32, requires_grad=True)
    for scale, low, high in (("inv_sqrt", 0.8, 3), (1.0, 1e6, math.inf)):
        x.grad = None
        y = blocks(100, 32, scale)(x)
        y.backward(torch.randn_like(y) / y.numel() ** 0.5)
        assert low < float(x.grad.norm()) < high
    model = blocks(12, 16, "inv")
    norms = [[float(torch.linalg.matrix_norm(b.branch.module[i].weight.detach(), 2)) for i in (0, 2)] for b in model]
    z = torch.randn(4, 16)
    assert bool((model(z).norm(dim=1) <= math.exp(max(a * b for a, b in norms)) * z.norm(dim=1)).all())


def test_scales():
    for n, value in ((4, 2.4414), (16, 2.6379), (64, 2.6973), (1024, 2.7170)):
        assert (1 + residual_scale(n, "inv")) ** n == pytest.approx(value, abs=1e-4)
    assert residual_scale(16) == 0.25 and residual_scale(3, 0.7) == 0.7


def images(n: int = 4):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("learn", [False, True])
def test_a_resnet_loses_its_norms_and_folds(learn):
    torch.manual_seed(0)
    model = scale_residuals(resnet20(width=8), learn=learn)
    scaled = [m for m in model.modules() if isinstance(m, ScaledOutput)]
    assert len(scaled) == 9 and all(float(m.scale.detach()) == pytest.approx(1 / 3) for m in scaled)
    assert not any(isinstance(m, NORMS) for m in model.modules())
    y = model(images())
    y.square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith("scale")]
    assert len(grads) == 9 * learn and all(float(g.abs()) > 0 for g in grads)
    names = {n for n in resnet20(width=8).state_dict() if ".bn" not in n and not n.startswith("bn")}
    pw.fold(model)
    assert torch.allclose(model(images()), y, atol=1e-6, rtol=1e-5)
    assert names <= model.state_dict().keys() and not any("module" in n for n in model.state_dict())


def test_layers_of_the_branches_are_drawn_in_their_order():
    model = resnet20(width=4)
    torch.manual_seed(3)
    scale_residuals(model)
    torch.manual_seed(3)
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            for layer in (block.conv1, block.conv2.module):
                drawn = nn.init.kaiming_normal_(torch.empty_like(layer.weight), nonlinearity="relu")
                assert torch.equal(layer.weight, drawn)


def test_kept_norms_do_not_undo_the_scale():
    torch.manual_seed(0)
    model = resnet20(width=8).eval()
    block, x = model.layer1[1], torch.randn(2, 8, 4, 4)
    for norm in (block.bn1, block.bn2):
        norm.running_var.uniform_(0.5, 2)
    branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    scale_residuals(model, [0.1 * k for k in range(9)], norms="keep", learn=True)
    expected = (0.1 * branch + x).relu()
    assert torch.allclose(block(x), expected, atol=1e-6)
    assert torch.equal(model.layer1[0](x), x.relu())
    pw.fold(model)
    assert torch.allclose(block(x), expected, atol=1e-6)
    assert model.state_dict().keys() == resnet20(width=8).state_dict().keys()


def test_refusals():
    with pytest.raises(PlanError, match="nothing to scale"):
        scale_residuals(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(PlanError, match="9 residual sums"):
        scale_residuals(resnet20(width=4), [0.1, 0.2])
    for scale in ("sqrt", math.inf):
        with pytest.raises(PlanError):
            residual_scale(3, scale)
    with pytest.raises(PlanError, match="at least one"):
        residual_scale(0)
