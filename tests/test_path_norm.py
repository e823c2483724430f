"""The 1-path-norm: simplified against matrices and brute-force enumeration, Lipschitz bounds, PSiLON's networks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import PlanError
from pennyweight.layers.psilon_block import CReLU, PSiLONBlock, l1_norm_of, psilon_linear
from pennyweight.losses.path_norm import path_norm, path_norm_by_forward
from pennyweight.models.psilon_net import psilon_net, psilon_resnet
from pennyweight.models.resnet_cifar import resnet20
from pennyweight.training.schedule import set_progress


def with_lengths(model: nn.Module, *lengths) -> nn.Module:
    norms = [n for m in model.modules() if isinstance(m, nn.Linear) and (n := l1_norm_of(m)) is not None]
    assert len(norms) == len(lengths)
    with torch.no_grad():
        for norm, length in zip(norms, lengths):
            norm.length.copy_(torch.tensor(length))
    return model


def enumerated(matrices: list[torch.Tensor]) -> float:
    """Over every path, one unit of each layer after the other."""
    total, sizes = 0.0, [matrices[0].shape[1], *(len(m) for m in matrices)]
    for path in itertools.product(*map(range, sizes)):
        product = 1.0
        for matrix, (start, end) in zip(matrices, itertools.pairwise(path)):
            product *= abs(float(matrix[end, start]))
        total += product
    return total


def test_simplified_is_the_product_of_lengths_and_the_sum_over_paths():
    torch.manual_seed(0)
    model = with_lengths(psilon_net(3, 2, width=4, hidden=2).double(), 1.3, -0.7, [0.5, -2.0])
    value = path_norm(model).item()
    assert value == pytest.approx(2.275, rel=1e-6)
    matrices = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    assert value == pytest.approx(enumerated(matrices), rel=1e-6)
    assert path_norm(pw.fold(model)).item() == pytest.approx(value, rel=1e-6)  # the same by matrices
    assert path_norm_by_forward(model, torch.zeros(1, 3).double()).item() == pytest.approx(value, rel=1e-6)


def residual(lengths=(1.3, 0.6, -0.4, [0.5, -2.0])) -> nn.Module:
    torch.manual_seed(0)
    model = psilon_resnet(4, 2, width=5, hidden=3).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.parametrizations.weight.original.normal_()  # halves apart
    return with_lengths(model, *lengths)


def test_residual_bound_is_the_product_and_its_matrix_form():
    model = residual()
    assert path_norm(model).item() == pytest.approx(1.3 * 1.6 * 1.4 * 2.5, rel=1e-6)
    steps = []
    for module in model.layers:
        if isinstance(module, PSiLONBlock):
            steps.append(torch.eye(5) + torch.maximum(*module.linear.weight.detach().abs().chunk(2, 1)))
        elif isinstance(module, nn.Linear):
            weight = module.weight.detach().abs()
            steps.append(torch.maximum(*weight.chunk(2, 1)) if len(steps) == 3 else weight)
    u = torch.ones(4).double()
    for step in steps:
        u = step @ u
    assert path_norm(model).item() == pytest.approx(u.sum().item(), rel=1e-9)
    assert path_norm(model, improved=False).item() > 1.5 * path_norm(model).item()


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_no_pair_of_inputs_exceeds_the_bound(kind):
    torch.manual_seed(0)
    model = residual() if kind == "residual" else psilon_net(4, 2, width=5, hidden=3).double()
    a, b = torch.randn(2, 4000, 4, dtype=torch.float64)
    with torch.no_grad():
        ratio = (model(a) - model(b)).abs().sum(1) / (a - b).abs().amax(1)
    assert 0 < float(ratio.max()) <= path_norm(model).item()


def test_one_layer_reaches_the_bound():
    layer = psilon_linear(6, 1, length=-1.7)
    x = layer.weight.detach().sign()
    assert abs(float((layer(x) - layer(0 * x)).detach())) == pytest.approx(1.7, rel=1e-5) == path_norm(layer).item()


def test_crelu_halves_and_blocks_at_the_start():
    z = torch.randn(3, 5)
    assert torch.equal(sum(CReLU()(z).chunk(2, 1)), z)
    model = psilon_resnet(4, 2, width=6, hidden=4)
    x = torch.randn(3, 4)
    assert torch.allclose(model(x), model.layers[-1](CReLU()(model.layers[0](x))))  # blocks are the identity
    block = with_lengths(PSiLONBlock(5), 0.8)
    a, b = torch.randn(2, 3, 5)
    assert torch.allclose(block(a + b), block(a) + block(b), atol=1e-5)  # A = B: linear
    assert path_norm(block).item() == pytest.approx(1.8 * 5)  # of each of five outputs


def test_trained_with_the_penalty_then_sparse_then_folded():
    torch.manual_seed(0)
    x = torch.randn(40, 12)
    y, norms = x[:, :1].relu() - x[:, 1:2], []
    for strength in (0.0, 0.1):
        torch.manual_seed(1)
        model = psilon_resnet(12, 1, width=10, hidden=2, sparsify=0.5)
        optimizer = torch.optim.Adam(model.parameters(), 5e-2)
        losses = []
        for step in range(20):
            set_progress(model, (step + 1) / 20)
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            (loss + strength * path_norm(model)).backward()
            optimizer.step()
            losses.append(loss.item())
        norms.append(path_norm(model).item())
        assert losses[-1] < losses[0]
    folded = pw.fold(model)
    assert path_norm(folded).item() == pytest.approx(norms[-1], rel=1e-5)  # lengths hold while weights become zeros
    assert float((folded.layers[0].weight == 0).float().mean()) > 0.3
    assert not any("parametrizations" in key for key in folded.state_dict())
    assert norms[1] < norms[0]


def test_any_relu_network_by_forward():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).double()
    dense = torch.zeros(8, 9, dtype=torch.float64)  # the convolution as a matrix
    for o, i, j, di, dj in itertools.product(range(2), range(2), range(2), range(2), range(2)):
        dense[o * 4 + i * 2 + j, (i + di) * 3 + j + dj] = conv[0].weight.detach()[o, 0, di, dj]
    value = path_norm_by_forward(conv, torch.zeros(1, 1, 3, 3, dtype=torch.float64))
    assert value.item() == pytest.approx(enumerated([dense, conv[3].weight.detach()]), rel=1e-9)
    value.backward()
    assert conv[0].weight.grad is not None and conv[0].bias.grad is None
    with pytest.raises(PlanError, match="BatchNorm2d"):
        path_norm_by_forward(resnet20(width=4), torch.zeros(1, 3, 8, 8))


def test_refusals():
    with pytest.raises(PlanError, match="path_norm_by_forward"):
        path_norm(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(PlanError, match="fold"):
        path_norm_by_forward(psilon_net(3, 1, width=4), torch.zeros(1, 3))
    with pytest.raises(PlanError, match="no Linear"):
        path_norm(nn.Sequential(nn.ReLU()))
