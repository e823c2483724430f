"""EMAN: outputs without batch mates, recursions in closed form, limits, what is averaged and what is copied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import PlanError
from pennyweight.layers.eman import EMATeacher, cosine_momentum
from pennyweight.training.hooks import attach


def student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) * 2 + 1


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def test_a_sample_has_no_batch_mates():
    model = student()
    teacher, plain = EMATeacher(model), EMATeacher(model, buffers="own", mode="train")
    assert plain.training and plain.model[1].training and not teacher.model[1].training
    teacher.train()
    whole = teacher(X)
    assert torch.allclose(teacher(X[3:4]), whole[3:4], atol=1e-6)
    assert torch.allclose(teacher(X.flip(0)), whole.flip(0), atol=1e-6)
    assert not torch.allclose(plain(X[:8]), plain(X)[:8], atol=1e-2)
    assert not whole.requires_grad


def test_recursion_and_geometric_approach():
    model = student()
    teacher = EMATeacher(model, 0.9)
    model[1].running_mean.fill_(1)
    found = []
    for _ in range(3):
        teacher.update()
        found.append(float(teacher.model[1].running_mean[0]))
    assert found == pytest.approx([0.1, 0.19, 0.271]) and int(teacher.updates) == 3
    teacher, start = EMATeacher(model, 0.8), {}
    with torch.no_grad():
        for name, tensor in teacher.model.state_dict().items():
            if tensor.is_floating_point():
                tensor += 1 + torch.rand_like(tensor)
                start[name] = tensor - model.state_dict()[name]
    for _ in range(7):
        teacher.update()
    for name, distance in start.items():  # weights and statistics at one rate
        assert torch.allclose(teacher.model.state_dict()[name] - model.state_dict()[name], 0.8**7 * distance, atol=1e-6)


def test_momentum_zero_and_one():
    model = student()
    same, still = EMATeacher(model, 0.0), EMATeacher(model, 1.0)
    first = copy.deepcopy(still.model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach(optimizer, [same, still])
    for _ in range(3):
        step(model, optimizer)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in same.model.state_dict().items())
    assert torch.equal(same(X), model.eval()(X))
    assert all(torch.equal(t, first[n]) for n, t in still.model.state_dict().items() if t.is_floating_point())
    assert int(same.updates) == 3


def test_forwards_leave_the_teacher_alone():
    teacher = EMATeacher(student())
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    teacher(X)
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


def test_byol_schedule():
    assert [cosine_momentum(t, 10) for t in (0, 5, 10)] == pytest.approx([0.98, 0.99, 1.0])


def test_kinds_of_buffers():
    model = student()
    model.register_buffer("direction", torch.tensor([1.0, 0.0]))
    teachers = {rule: EMATeacher(model, 0.5, buffers=rule) for rule in ("ema", "copy", "own")}
    model(X)
    model.direction.copy_(torch.tensor([0.0, 1.0]))
    expected = model[1].running_mean.clone()
    for rule, share in (("ema", 0.5), ("copy", 1.0), ("own", 0.0)):
        teachers[rule].update()
        made = teachers[rule].model
        assert torch.allclose(made[1].running_mean, share * expected)
        assert int(made[1].num_batches_tracked) == (rule != "own")
        assert torch.equal(made.direction, model.direction)  # copied: an average would be shorter than 1
        assert made[1].num_batches_tracked.dtype == torch.int64 and bool((made[1].running_var > 0).all())


def test_latent_weights_of_a_quantised_student_are_averaged():
    model = pw.prepare(student(), {"rules": [{"match": "3", "weight": "binary"}]})
    teacher = EMATeacher(model, 0.9)
    latent = teacher.model[3].parametrizations.weight.original.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    attach(optimizer, [teacher])
    step(model, optimizer)
    expected = 0.9 * latent + 0.1 * model[3].parametrizations.weight.original
    assert torch.allclose(teacher.model[3].parametrizations.weight.original, expected, atol=1e-6)
    assert teacher.model[3].weight.abs().flatten(1).diff(dim=1).abs().max() < 1e-6  # signs times one scale a row


def test_state_dict_brings_everything_back():
    model = student()
    teacher = EMATeacher(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach(optimizer, [teacher])
    step(model, optimizer)
    again = EMATeacher(student(), 0.9)
    again.load_state_dict(teacher.state_dict())
    assert int(again.updates) == 1 and torch.equal(again(X), teacher(X))
    assert not any("_student" in key for key in teacher.state_dict())


def test_refusals():
    for options in ({"momentum": 1.1}, {"buffers": "none"}, {"mode": "off"}):
        with pytest.raises(PlanError):
            EMATeacher(student(), **options)
    model = student()
    teacher = EMATeacher(model)
    model[3] = nn.Linear(6, 6, bias=False)
    with pytest.raises(PlanError, match=r"3\.bias"):
        teacher.update()
