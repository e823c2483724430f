"""Folding, para-normalising, bias correction and bias tuning: what each must restore, exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pennyweight.compress.distillation import bias_tune, divergence
from pennyweight.compress.folding import fold_batch_norm
from pennyweight.compress.norms import correct_bias, para_normalise
from pennyweight.errors import DataError, PlanError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained_norm(norm: nn.Module, seed: int = 3) -> None:
    """Statistics and affine values that are far from the defaults, some gammas negative."""
    with torch.no_grad():
        channels = norm.running_mean.shape[0]  # pyright: ignore
        norm.running_mean.copy_(torch.randn(channels, generator=seeded(seed)))  # pyright: ignore
        norm.running_var.copy_(torch.rand(channels, generator=seeded(seed + 1)) + 0.3)  # pyright: ignore
        norm.weight.copy_(torch.randn(channels, generator=seeded(seed + 2)))  # pyright: ignore
        norm.weight[0] = -0.7  # pyright: ignore
        norm.bias.copy_(torch.randn(channels, generator=seeded(seed + 3)))  # pyright: ignore


class Net(nn.Module):
    """Every kind of pair there is, a residual sum, and a norm that follows no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False)
        self.norm3 = nn.BatchNorm2d(6)
        self.alone = nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                trained_norm(module)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(x + self.norm2(self.grouped(x)))
        x = self.alone(torch.relu(self.norm3(self.up(x))))
        return self.head(x.mean((2, 3)))


def images(n: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=seeded(seed))


def test_fold_keeps_outputs_and_records_gamma_and_beta() -> None:
    torch.manual_seed(0)
    net = Net()
    gamma, beta = net.norm.weight.detach().clone(), net.norm.bias.detach().clone()
    before = net(images())
    folded = fold_batch_norm(net, images(2, 1))
    torch.testing.assert_close(net(images()), before, rtol=1e-4, atol=1e-5)
    assert [(f.layer, f.norm) for f in folded] == [
        ("conv", "norm"),
        ("grouped", "norm2"),
        ("up", "norm3"),
        ("head.0", "head.1"),
    ]
    assert isinstance(net.norm, nn.Identity) and isinstance(net.alone, nn.BatchNorm2d)
    assert torch.equal(folded[0].gamma, gamma) and torch.equal(folded[0].beta, beta)
    assert net._pennyweight_folded == folded
    assert fold_batch_norm(net, images(2, 1)) == []  # nothing left, and what was folded is remembered
    assert net._pennyweight_folded == folded


class Reused(nn.Module):
    """The first layer's raw output is read twice, so its norm must stay; the second pair folds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second, self.norm2 = nn.Linear(4, 4), nn.BatchNorm1d(4)
        trained_norm(self.norm1)
        trained_norm(self.norm2, 9)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        raw = self.first(x)
        return self.norm2(self.second(self.norm1(raw) + raw))


def test_a_pair_whose_tensor_is_used_elsewhere_is_left_alone() -> None:
    torch.manual_seed(0)
    net, x = Reused(), torch.randn(10, 4, generator=seeded(0))
    before = net(x)
    weight = net.first.weight.detach().clone()
    assert [f.layer for f in fold_batch_norm(net, x)] == ["second"]
    assert torch.equal(net.first.weight, weight)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_modes_are_restored() -> None:
    net = Net()
    net.train()
    net.head.eval()
    modes = [m.training for m in net.modules()]
    fold_batch_norm(net, images(2))
    para_normalise(net, [images()])
    assert [m.training for m in net.modules() if not isinstance(m, nn.Identity)] == [
        t for t, m in zip(modes, net.modules()) if not isinstance(m, nn.Identity)
    ]
    assert net.alone.momentum == 0.1


def folded_layer(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    """conv + norm whose running statistics are those of its data, folded: output mean beta, deviation |gamma|."""
    torch.manual_seed(seed)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), images(32)
    trained_norm(net[1])
    with torch.no_grad():
        raw = net[0](x)
        net[1].running_mean.copy_(raw.mean((0, 2, 3)))  # pyright: ignore
        net[1].running_var.copy_(raw.var((0, 2, 3), correction=0))  # pyright: ignore
    net.eval()
    fold_batch_norm(net, x)
    return net, x


def test_para_normalise_is_the_identity_where_statistics_have_not_moved() -> None:
    net, x = folded_layer()
    before = net(x)
    corrections = para_normalise(net, [x])
    # gamma enters as |gamma| / sqrt(var) against gamma / sqrt(var + eps): eps is all the difference.
    torch.testing.assert_close(corrections["0"].multiplier, torch.ones(8), rtol=2e-4, atol=0)
    torch.testing.assert_close(net(x), before, rtol=2e-4, atol=2e-4)
    again = para_normalise(net, [x])
    torch.testing.assert_close(again["0"].multiplier, torch.ones(8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("pieces", [[32], [7, 20, 5]])
def test_para_normalise_restores_mean_and_spread_of_a_damaged_layer(pieces: list[int]) -> None:
    net, x = folded_layer()
    record = net._pennyweight_folded[0]
    with torch.no_grad():  # 3-bit rounding, as a row of codes times a step
        weight = net[0].weight
        step = weight.abs().amax((1, 2, 3), keepdim=True) / 3  # pyright: ignore
        codes = (weight / step).round()  # pyright: ignore
        weight.copy_(codes * step)  # pyright: ignore
    corrections = para_normalise(net, x.split(pieces))
    with torch.no_grad():
        output = net(x).double()
    torch.testing.assert_close(output.mean((0, 2, 3)), record.beta.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.std((0, 2, 3), correction=0), record.gamma.abs().double(), rtol=1e-5, atol=1e-5)
    assert bool((record.gamma < 0).any())  # the folded weight carries the sign: nothing is flipped
    multiplier = corrections["0"].multiplier.view(-1, 1, 1, 1)
    assert bool((multiplier > 0).all())
    recovered = net[0].weight / (step * multiplier)  # pyright: ignore
    torch.testing.assert_close(recovered, codes, rtol=1e-5, atol=1e-5)  # integer codes are what they were
    torch.testing.assert_close(corrections["0"].bias, net[0].bias.detach())  # pyright: ignore


def test_para_normalise_repairs_later_layers_on_repaired_inputs() -> None:
    torch.manual_seed(0)
    net = Net()
    fold_batch_norm(net, images(2))
    with torch.no_grad():
        net.conv.weight.mul_(1.7)
        net.grouped.weight.mul_(0.6)
    x = images(32)
    para_normalise(net, [x])
    outputs: dict[str, Tensor] = {}
    for name in ("conv", "grouped", "up"):
        net.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o.double()}))
    with torch.no_grad():
        net(x)
    for record in net._pennyweight_folded[:3]:  # exact for one batch, all layers at once
        got = outputs[record.layer]
        torch.testing.assert_close(got.mean((0, 2, 3)), record.beta.double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.std((0, 2, 3), correction=0), record.gamma.abs().double(), rtol=1e-4, atol=1e-4)


def test_a_constant_channel_is_shifted_not_blown_up() -> None:
    net, x = folded_layer()
    with torch.no_grad():
        net[0].weight[2] = 0  # pyright: ignore
    correction = para_normalise(net, [x])["0"]
    assert correction.multiplier[2] == 1
    record = net._pennyweight_folded[0]
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:, 2].mean(), record.beta[2])


def test_unfolded_norms_get_the_statistics_of_the_data() -> None:
    net, x = nn.Sequential(nn.BatchNorm1d(4)), torch.randn(50, 4, generator=seeded(0)) * 3 + 2
    net.eval()
    para_normalise(net, [x])
    torch.testing.assert_close(net[0].running_mean, x.mean(0))
    torch.testing.assert_close(net[0].running_var, x.var(0))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 12, bias=False), nn.Linear(12, 4))
    return net.eval()


def test_correct_bias_restores_means_in_order_and_layer_norm_spread() -> None:
    reference, x = transformer(), torch.randn(64, 6, generator=seeded(1))
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in (model[0].weight, model[3].weight, model[4].weight):  # pyright: ignore
            parameter.copy_((parameter * 4).round() / 4)
    unbiased = model[3].weight.detach().clone()  # pyright: ignore
    shifts = correct_bias(model, reference, [x], match_layer_norm=True)
    assert set(shifts) == {"0", "2", "4"}
    seen: dict[str, list[Tensor]] = {"0": [], "2": [], "4": []}
    with torch.no_grad():
        for net in (model, reference):
            value = x
            for name, module in net.named_children():
                value = module(value)
                if name in seen:
                    seen[name].append(value)
    for got, wanted in seen.values():
        torch.testing.assert_close(got.mean(0), wanted.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["2"][0].std(0), seen["2"][1].std(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(model[3].weight, unbiased)  # pyright: ignore
    for shift in correct_bias(model, reference, [x], match_layer_norm=True).values():  # a second pass has nothing to do
        assert float(shift.abs().max()) < 1e-4


def test_correct_bias_of_an_unchanged_model_changes_nothing() -> None:
    reference = transformer()
    model = copy.deepcopy(reference)
    correct_bias(model, reference, [torch.randn(64, 6, generator=seeded(1))], match_layer_norm=True)
    for (_, a), (_, b) in zip(model.named_parameters(), reference.named_parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_bias_tune_moves_biases_only_and_never_makes_it_worse() -> None:
    reference, x = transformer(), torch.randn(96, 6, generator=seeded(1))
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model[0].bias.add_(0.5)  # pyright: ignore
        model[4].weight.copy_((model[4].weight * 6).round() / 6)  # pyright: ignore
    before_state = {k: v.clone() for k, v in model.state_dict().items()}
    for loss in ("kl", "mse"):
        before, after = bias_tune(model, reference, x.split(32), steps=60, lr=2e-2, loss=loss, skip=("4",))
        assert after <= before
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before_state[k])}
    assert changed and changed <= {"0.bias", "2.bias"}
    with torch.no_grad():
        assert float(divergence(model(x), reference(x), "mse")) < 0.5 * _mse(before_state, reference, x)
    before, after = bias_tune(model, reference, [x], steps=2, lr=100.0)  # wild steps are not kept
    assert after == before
    assert all(p.grad is None for p in model.parameters())


def _mse(state: dict[str, Tensor], reference: nn.Module, x: Tensor) -> float:
    model = transformer()
    model.load_state_dict(state)
    with torch.no_grad():
        return float(divergence(model(x), reference(x), "mse"))


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    torch.testing.assert_close(divergence(q.log(), p.log(), "kl"), expected)
    assert divergence(torch.tensor([2.0]), torch.tensor([1.0]), "mse") == 1


def test_bad_input_is_refused() -> None:
    model = transformer()
    for repair in (lambda: para_normalise(model, []), lambda: correct_bias(model, model, [])):
        with pytest.raises(DataError, match="empty"):
            repair()
    with pytest.raises(DataError, match="empty"):
        bias_tune(model, copy.deepcopy(model), [])
    with pytest.raises(PlanError, match="no bias"):
        bias_tune(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), [torch.ones(1, 2)])
