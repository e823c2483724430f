"""Batch-channel norm: identities with torch's norms, the estimates' recursion, micro-batches, conversion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.errors import PlanError
from pennyweight.layers.batch_channel_norm import BatchChannelNorm, EstimatedBatchNorm, use_batch_channel_norm
from pennyweight.models.resnet_cifar import resnet20


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.mark.parametrize("shape", [(6, 8, 5, 4), (6, 8, 7), (6, 8)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_batch_form_is_batch_norm_then_group_norm(shape, groups):
    if shape == (6, 8) and groups == 8:
        pytest.skip("one value has no variance")
    x = images(*shape)
    norm = BatchChannelNorm(8, groups, estimate=False)
    with torch.no_grad():
        for p in norm.parameters():
            p.uniform_(0.5, 2)
    y = F.batch_norm(x, None, None, norm.batch_norm.weight, norm.batch_norm.bias, training=True)
    grouped = F.group_norm(y, groups).unflatten(1, (groups, -1))
    view = (1, groups, *[1] * (len(shape) - 1))
    expected = (grouped * norm.weight.view(view) + norm.bias.view(view)).flatten(1, 2)
    assert torch.allclose(norm(x), expected, atol=1e-5)
    assert sum(p.numel() for p in norm.parameters()) == 2 * 8 + 2 * groups


def test_groups_of_one_and_of_all():
    x = images(3, 4, 5, 5)
    instance, layer = BatchChannelNorm(4, 4).eval(), BatchChannelNorm(4, 1).eval()
    assert torch.allclose(instance(x), F.instance_norm(x), atol=1e-4)
    assert torch.allclose(layer(x), F.layer_norm(x, x.shape[1:]), atol=1e-4)


def test_estimates_follow_their_recursion():
    norm = EstimatedBatchNorm(3, rate=0.25).double()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for step in range(4):
        x = images(2, 3, 4, 4, seed=step).double()
        y = norm(x)
        spread = (x - mean.view(1, 3, 1, 1)).square().mean((0, 2, 3))
        mean = 0.75 * mean + 0.25 * x.mean((0, 2, 3))
        var = 0.75 * var + 0.25 * spread
        expected = (x - mean.view(1, 3, 1, 1)) / (var.view(1, 3, 1, 1) + 1e-5).sqrt()
        assert torch.allclose(norm.running_mean, mean) and torch.allclose(norm.running_var, var)
        assert torch.allclose(y, expected)


def test_first_call_tells_the_variance_around_the_old_mean():
    norm = EstimatedBatchNorm(2, rate=1.0)
    y = norm(torch.full((4, 2, 3, 3), 3.0))
    assert torch.equal(norm.running_mean, torch.full((2,), 3.0))
    assert torch.equal(norm.running_var, torch.full((2,), 9.0)) and torch.equal(y, torch.zeros_like(y))


def test_rate_zero_is_an_affine_map_and_evaluation_changes_nothing():
    x = images(4, 2, 3, 3)
    norm = EstimatedBatchNorm(2, rate=0.0)
    assert torch.allclose(norm(x), x / (1 + 1e-5) ** 0.5)
    norm = EstimatedBatchNorm(2)
    norm(x)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    norm.eval()(x)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_no_gradient_through_the_estimates_and_micro_batches_accumulate():
    norm = EstimatedBatchNorm(3)
    x = images(4, 3, 2, 2).requires_grad_()
    norm(x).sum().backward()
    factor = (norm.running_var + 1e-5).rsqrt()
    assert torch.allclose(x.grad, factor.view(1, 3, 1, 1).expand_as(x))
    assert not any(b.requires_grad for b in norm.buffers())
    norm = BatchChannelNorm(4, 2)
    outputs = [norm(images(1, 4, 3, 3, seed=i)) for i in range(3)]  # graphs of all parts alive at once
    sum(y.square().sum() for y in outputs).backward()
    assert all(bool(p.grad.isfinite().all()) for p in norm.parameters())


def test_estimates_are_blind_to_batch_mates_once_settled():
    norm = BatchChannelNorm(4, 2).eval()
    x = images(5, 4, 3, 3)
    assert torch.allclose(norm(x)[:1], norm(x[:1]), atol=1e-6)


@pytest.mark.parametrize("estimate", [True, False])
def test_conversion_of_a_resnet(estimate):
    torch.manual_seed(0)
    model = resnet20(width=8)
    model(images(4, 3, 8, 8))
    gamma = model.layer1[0].bn1.running_var.clone()
    plain = model.eval()(images(2, 3, 8, 8))
    use_batch_channel_norm(model, estimate=estimate)
    assert torch.equal(model.layer1[0].bn1.batch_norm.running_var, gamma)
    assert not model.layer1[0].bn1.training
    model.train()
    y = model(images(1, 3, 8, 8) if estimate else images(2, 3, 8, 8))
    y.sum().backward()
    assert y.isfinite().all() and plain.isfinite().all()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with pytest.raises(PlanError, match="no batch norm"):
        use_batch_channel_norm(nn.Linear(2, 2))


def test_refusals():
    with pytest.raises(PlanError, match="groups"):
        BatchChannelNorm(6, 4)
    with pytest.raises(PlanError, match="rate"):
        EstimatedBatchNorm(4, rate=1.5)
