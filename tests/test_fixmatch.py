"""FixMatch: its loss by hand, what has no part in it, and training by recipe, which resumes exactly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight import load
from pennyweight.errors import DataError, PlanError
from pennyweight.training.data import load_data
from pennyweight.training.fixmatch import FixMatch
from pennyweight.training.loop import train
from pennyweight.training.settings import DataSettings, TrainingRecipe
from pennyweight.training.trained import load_trained

CENTRES = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)) * 2


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 3
    return CENTRES[classes] + torch.randn(count, 5, generator=draw), classes


def splits() -> dict[str, tuple[Tensor, Tensor]]:
    return {"train": samples(12, 2), "validation": samples(30, 3), "test": samples(60, 4)}


def student() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def noisy(x: Tensor) -> Tensor:
    return x + 0.3 * torch.randn_like(x)


def fixmatch(**options) -> FixMatch:
    values = {"weak": noisy, "strong": noisy, "ratio": 3, "weight": 1.0, "momentum": 0.9}
    return FixMatch(student(), samples(200, 5)[0], **{**values, **options})


def recipe(output: Path, steps: int = 40, **options) -> TrainingRecipe:
    return TrainingRecipe.from_dict(
        {
            "model": {"name": f"{__name__}:fixmatch", "options": options},
            "data": {"name": f"{__name__}:splits"},
            "batch": 4,
            "steps": steps,
            "optimizer": {"name": "sgd", "lr": 0.05, "options": {"momentum": 0.9}},
            "checkpoint_every": 10,
            "output": str(output),
        }
    )


@pytest.mark.parametrize("threshold", [0.0, 0.95, 1.0])
def test_the_loss_is_the_formula(threshold):
    torch.manual_seed(0)
    model = fixmatch(
        weak=lambda x: x + 1, strong=lambda x: 2 * x, rows=torch.arange, threshold=threshold, weight=0.3
    ).train()
    with torch.no_grad():  # so that the teacher is no copy of the student, and sure of some
        for weight in model.teacher.model.parameters():
            weight.mul_(3)
    x, y = samples(4, 6)
    u = model.unlabelled[:12]
    p = model.teacher.model(u + 1).softmax(1)
    assert not model.teacher.model.training and 0 < int((p.max(1).values >= 0.95).sum()) < 12
    logits = model.student(torch.cat([x + 1, 2 * u]))
    wanted = F.cross_entropy(logits[:4], y)
    for i in range(12):
        if float(p[i].max()) >= threshold:
            wanted = wanted + 0.3 / 12 * -logits[4 + i].log_softmax(0)[p[i].argmax()]
    loss = model.training_loss(x, y)
    assert torch.allclose(loss, wanted, atol=1e-6)
    rows, classes = model.guesses
    assert torch.equal(rows, torch.arange(12)) and torch.equal(classes, p.argmax(1))
    loss.backward()
    assert all(weight.grad is None for weight in model.teacher.parameters())
    assert all(weight.grad is not None for weight in model.student.parameters())


def test_without_unlabelled_samples_it_is_cross_entropy():
    torch.manual_seed(0)
    model = fixmatch(ratio=0, weak=lambda x: x)
    x, y = samples(4, 6)
    assert torch.equal(model.training_loss(x, y), F.cross_entropy(model.student(x), y))
    assert model.guesses[0].numel() == 0


def test_a_recipe_trains_student_and_teacher_and_resumes_exactly(tmp_path):
    whole = train(recipe(tmp_path / "whole"))
    assert whole.report["test"]["accuracy"] > 0.8
    model = whole.model
    assert isinstance(model, FixMatch) and int(model.teacher.updates) == 40
    assert not any("unlabelled" in name for name in model.state_dict())
    for name, value in model.teacher.model.state_dict().items():
        if value.is_floating_point():
            assert not torch.equal(value, model.student.state_dict()[name])

    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done == 23:
            raise Stop

    with pytest.raises(Stop):
        train(recipe(tmp_path / "cut"), progress=stop)
    resumed = train(recipe(tmp_path / "cut"), resume=True)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("deploy", ["student", "teacher"])
def test_what_is_deployed_alone_is_packed_and_loaded(tmp_path, deploy):
    values = recipe(tmp_path / "run", deploy=deploy).to_dict() | {"shrink": {"size": "2kB", "samples": 12}}
    result = train(TrainingRecipe.from_dict(values))
    model = result.model
    chosen = model.student if deploy == "student" else model.teacher.model
    x = samples(20, 7)[0]
    assert torch.equal(model(x), chosen(x)) and not torch.equal(model.student(x), model.teacher(x))
    loaded, _ = load_trained(tmp_path / "run")
    assert isinstance(loaded, nn.Sequential) and torch.equal(loaded(x), chosen(x))
    assert result.report["packed_bytes"] <= 2000
    assert set(result.report["packed_test"]) == {"loss", "accuracy"}
    small = load(tmp_path / "run" / "packed", model=loaded)
    assert torch.allclose(small(x), chosen(x), atol=0.2)


@pytest.mark.parametrize(
    "wrong", [{"ratio": -1}, {"threshold": 1.5}, {"weight": -0.1}, {"threshold": math.nan}, {"deploy": "both"}]
)
def test_refusals(wrong):
    with pytest.raises(PlanError, match="fixmatch"):
        fixmatch(**wrong)
    with pytest.raises(PlanError, match="no unlabelled"):
        FixMatch(student(), torch.empty(0, 5), weak=noisy, strong=noisy)


def test_a_set_may_bring_its_validation_split():
    data = load_data(DataSettings(f"{__name__}:splits"), seed=0)
    assert data.validation is not None and len(data.validation) == 30 and len(data.train) == 12
    with pytest.raises(DataError, match="a validation split of its own"):
        load_data(DataSettings(f"{__name__}:splits", validation=4), seed=0)
