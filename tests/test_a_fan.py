"""A-FAN: the attack in closed form, mixing, who gets which gradient, statistics, cost."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.errors import PlanError
from pennyweight.layers.a_fan import AdversarialFeatures, mix
from pennyweight.training.loop import train
from pennyweight.training.settings import TrainingRecipe


def network(**options) -> AdversarialFeatures:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    tail = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return AdversarialFeatures(head, tail, **options)


X = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{"steps": 0}, {"gamma": 0.0, "steps": 3}])
def test_without_an_attack_the_tail_trains_as_ever_and_the_head_by_half(options):
    model = network(**options)
    plain = gradients(model, F.cross_entropy(model(X), Y))
    loss = model.training_loss(X, Y)
    found = gradients(model, loss)
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(model(X), Y).detach()), rel=1e-5)
    for name, gradient in plain.items():
        assert torch.allclose(found[name], gradient if name.startswith("tail") else gradient / 2, atol=1e-6), name


def test_linear_tail():
    tail = nn.Linear(2, 1, bias=False)
    tail.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
    model = AdversarialFeatures(
        nn.Identity(), tail, gamma=0.1, units="absolute", loss=lambda z, y: F.softplus(-y * z).mean()
    )
    f, y = torch.tensor([[0.3, 0.2]]), torch.ones(1, 1)
    leaf = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.criterion(tail(leaf), y), leaf)
    assert torch.allclose(gradient, torch.tensor([[-0.524979, 1.049958]]), atol=1e-6)
    attacked = model.attack(f, y)
    assert torch.allclose(attacked, torch.tensor([[0.2, 0.3]]))
    losses = [model.criterion(tail(each), y).item() for each in (f, attacked)]
    assert losses == pytest.approx([0.744397, 0.913015], abs=1e-6)


@pytest.mark.parametrize("units", ["rms", "absolute"])
def test_reach_of_the_attack(units):
    f = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2)) * 3
    unit = float(f.square().mean().sqrt()) if units == "rms" else 1.0
    y = torch.tensor([0, 1, 2, 0])

    def distance(**options) -> float:
        return float((network(units=units, **options).attack(f, y) - f).abs().max()) / unit

    assert distance(steps=3, gamma=0.05) == pytest.approx(0.15, rel=1e-3)
    assert distance(steps=3, gamma=0.05, reach=0.08) == pytest.approx(0.08, rel=1e-3)
    torch.manual_seed(0)
    assert 0.05 < distance(steps=0, reach=0.08, random_start=True) <= 0.08 * (1 + 1e-5)


def test_small_attacks_do_harm():
    model = network(gamma=0.01, steps=2).eval()
    f = model.head(X)
    before, after = (F.cross_entropy(model.tail(each), Y) for each in (f, model.attack(f, Y)))
    assert float(after.detach()) > float(before.detach())


def test_mixing():
    f, attacked = torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1), torch.tensor([2.0, 2, 5]).view(1, 3, 1, 1)
    mixed = mix(f, attacked).flatten()
    assert torch.allclose(mixed, torch.tensor([1.267955, 3, 4.732045]), atol=1e-4)
    assert float(mixed.mean()) == pytest.approx(3) and float(mixed.std()) == pytest.approx(1.732045, abs=1e-4)
    a, b = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)), torch.randn(3, 4, 5, 5) * 2 + 1
    for statistics, axes in (("channel", (1,)), ("spatial", (2, 3)), ("batch", (0, 2, 3))):
        assert torch.allclose(mix(a, a, statistics), a, atol=1e-6)
        made = mix(a, b, statistics)
        assert torch.allclose(made.mean(axes), b.mean(axes), atol=1e-5)
        assert torch.allclose(made.std(axes), b.std(axes), atol=1e-2)


def test_the_attack_leaves_no_trace():
    model = network(steps=3, points=4, mixed=(2, 3))
    model.training_loss(X, Y)
    tail_once = copy.deepcopy(network())
    tail_once(X)  # the clean pass alone
    for (name, a), b in zip(model.state_dict().items(), tail_once.state_dict().values()):
        assert torch.equal(a, b), name
    assert all(p.grad is None for p in model.parameters())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model = network(steps=3, points=2, update_statistics="all")
    model.training_loss(X, Y)
    assert int(model.tail[1].num_batches_tracked) == 5 and int(model.head[1].num_batches_tracked) == 1


def test_augmented_maps_do_not_train_the_head():
    model = network(gamma=0.3, points=3, weight=2.0)
    plain = gradients(model, F.cross_entropy(model(X), Y))
    found = gradients(model, model.training_loss(X, Y))
    for name in plain:
        if float(plain[name].abs().max()) < 1e-6:
            continue  # a bias before a batch norm
        same = torch.allclose(found[name], plain[name] / 5, atol=1e-6)
        assert same == name.startswith("head"), name


def test_loss_is_the_weighted_mean_over_the_segment():
    model = network(gamma=0.2, points=5, mixed=(3, 4), weight=0.5).eval()
    f = model.head(X).detach()
    attacked = model.attack(f, Y)
    ends = [torch.lerp(f, attacked, i / 4) for i in range(5)]
    assert torch.equal(ends[0], f) and torch.equal(ends[4], attacked)
    maps = [f, *(mix(f, e) if i in (3, 4) else e for i, e in enumerate(ends) if i)]
    losses = [F.cross_entropy(model.tail(each), Y).item() for each in maps]
    assert model.training_loss(X, Y).item() == pytest.approx((losses[0] + 0.5 * sum(losses[1:])) / 3, rel=1e-5)


def test_passes_and_evaluation():
    model = network(steps=2, points=3).eval()
    calls = {"head": 0, "tail": 0}
    for name in calls:
        getattr(model, name).register_forward_hook(lambda *_, n=name: calls.__setitem__(n, calls[n] + 1))
    model.training_loss(X, Y)
    assert (calls["head"], calls["tail"]) == model.passes == (1, 5)
    assert torch.equal(model(X), model.tail(model.head(X)))


def samples() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {"train": (X, Y), "test": (X, Y)}


def test_the_training_loop_minimises_what_the_model_says(tmp_path):
    def recipe(**changes) -> TrainingRecipe:
        values = {
            "model": {"name": f"{__name__}:network", "options": {"steps": 2, "points": 3}},
            "data": {"name": f"{__name__}:samples"},
            "batch": 6,
            "steps": 2,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "schedule": {"name": "constant"},
        }
        return TrainingRecipe.from_dict({**values, **changes})

    found = train(recipe(output=str(tmp_path / "own"))).model
    model = network(steps=2, points=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.training_loss(X, Y).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(found.state_dict()[name], tensor, atol=1e-5), name
    with pytest.raises(PlanError, match="training loss of its own"):
        teacher = {"name": f"{__name__}:network"}
        train(recipe(teacher=teacher, output=str(tmp_path / "taught")))


def test_refusals():
    for options in (
        {"points": 1}, {"steps": -1}, {"mixed": (0,)}, {"points": 2, "mixed": (2,)}, {"statistics": "layer"},
        {"units": "pixels"}, {"random_start": True}, {"update_statistics": "none"},
    ):  # fmt: skip
        with pytest.raises(PlanError):
            network(**options)
