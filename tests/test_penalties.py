"""Penalties of training recipes: what is added to the loss, over time, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pennyweight.errors import PlanError, UnknownNameError
from pennyweight.losses.path_norm import path_norm
from pennyweight.training.loop import train
from pennyweight.training.metrics import read_metrics
from pennyweight.training.penalties import Penalties
from pennyweight.training.settings import TrainingRecipe


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3, bias=bias))


def points():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(5))
    return {"train": (x, x[:, :3].argmax(1)), "test": (x[:20], x[:20, :3].argmax(1))}


def recipe(directory, **changes) -> TrainingRecipe:
    base = {
        "model": {"name": f"{__name__}:mlp"},
        "data": {"name": f"{__name__}:points"},
        "batch": 20,
        "steps": 8,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "constant"},
        "log_every": 1,
        "checkpoint_every": 4,
        "output": str(directory),
    }
    return TrainingRecipe.from_dict(base | changes)


def test_strengths_schedules_and_names():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -4.0]]))
        model.bias.fill_(7.0)
    half = [[0, 0], [0.5, 1], [1, 0.5]]
    charged = Penalties(
        [
            {"method": "p-norm", "p": 1, "strength": 0.1},
            {"name": "squares", "method": "p-norm", "p": 2, "strength": "1e-2", "schedule": half, "match": ["*"]},
            {"method": "path-norm", "strength": 1, "schedule": half},
        ]
    )
    for share, factor in ((0, 0), (0.25, 0.5), (0.5, 1), (0.75, 0.75), (1, 0.5)):
        found = {name: value.item() for name, value in charged(model, share).items()}
        expected = {"p-norm": 0.7, "squares": factor * 0.01 * (9 + 16 + 49), "path-norm": factor * 7}
        assert found == pytest.approx(expected)


def test_path_norm_of_convolutions_by_the_shape_of_a_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    entry = {"method": "path-norm", "strength": 2.0, "input_shape": [1, 3, 3]}
    weight = model[0].weight.detach().abs().sum((1, 2, 3))  # each of a channel's four pixels sees ones
    expected = (model[3].weight.detach().abs() @ weight.repeat_interleave(4)).sum()
    assert Penalties([entry])(model, 0.0)["path-norm"].item() == pytest.approx(2 * expected.item(), rel=1e-6)


def test_a_squared_norm_is_coupled_weight_decay_up_to_rounding(tmp_path):
    coupled = train(recipe(tmp_path / "a", optimizer={"name": "sgd", "lr": 0.1, "weight_decay": 0.02}))
    penalty = {"method": "p-norm", "p": 2, "strength": 0.01}
    charged = train(recipe(tmp_path / "b", penalties=[penalty]))
    parts = train(recipe(tmp_path / "c", penalties=[penalty], accumulate=2))
    free = train(recipe(tmp_path / "d"))
    for a, b, c, d in zip(*(run.model.parameters() for run in (coupled, charged, parts, free))):
        assert torch.allclose(a, b, atol=1e-6) and torch.allclose(a, c, atol=1e-6)
        assert a.ndim < 2 or not torch.allclose(a, d, atol=1e-4)


def test_the_log_holds_the_tasks_loss_and_each_penalty_and_a_resume_goes_on(tmp_path, monkeypatch):
    entries = [
        {"method": "p-norm", "p": 1, "strength": 1e-3},
        {"method": "path-norm", "strength": 1e-2, "schedule": [[0.5, 0], [1, 1]]},
    ]
    whole = train(recipe(tmp_path / "whole", penalties=entries))
    rows = read_metrics(tmp_path / "whole")
    assert all(float(row["penalty_p-norm"]) > 0 for row in rows)
    assert [float(row["penalty_path-norm"]) > 0 for row in rows] == [False] * 5 + [True] * 3
    free = read_metrics(train(recipe(tmp_path / "free")).directory)
    assert rows[0]["loss"] == free[0]["loss"] and rows[1]["loss"] != free[1]["loss"]
    assert whole.report["last"]["penalty_p-norm"] == float(rows[-1]["penalty_p-norm"])

    from pennyweight.training import loop

    save = loop._Training._save
    stopped = recipe(tmp_path / "stopped", penalties=entries)

    def save_and_die(self):
        save(self)
        if self.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    train(stopped, resume=True)
    seconds = {"seconds": ""}
    assert [row | seconds for row in read_metrics(tmp_path / "stopped")] == [row | seconds for row in rows]


def test_the_path_norm_is_held_down(tmp_path):
    entry = {"method": "path-norm", "strength": 0.05}
    norms = [
        path_norm(train(recipe(tmp_path / str(i), steps=30, penalties=penalties)).model).item()
        for i, penalties in enumerate(([], [entry]))
    ]
    assert norms[1] < 0.7 * norms[0]


@pytest.mark.parametrize(
    ("entries", "error", "says"),
    [
        ([{"method": "p-nrm", "strength": 1}], UnknownNameError, "p-norm"),
        ([{"strength": 1}], UnknownNameError, "penalty"),
        ([{"method": "p-norm", "p": 1}], PlanError, "strength is None"),
        ([{"method": "p-norm", "p": 1, "strength": -1}], PlanError, "0 or more"),
        ([{"method": "p-norm", "strength": 1}], PlanError, "penalty p-norm.*'p'"),
        ([{"method": "p-norm", "p": -1, "strength": 1}], PlanError, "must be positive"),
        ([{"method": "p-norm", "p": 1, "strength": 1, "power": 2}], PlanError, "'power'"),
        ([{"method": "p-norm", "p": 1, "strength": 1, "schedule": [[0.5, 1], [0.2, 0]]}], PlanError, "rising"),
        ([{"method": "p-norm", "p": 1, "strength": 1, "schedule": 0.5}], PlanError, "points"),
        ([{"method": "p-norm", "p": 1, "strength": 1}] * 2, PlanError, "give each a name"),
        ([{"method": "p-norm", "p": 1, "strength": 1, "match": ["nothing.*"]}], PlanError, "no parameter matches"),
        ([{"method": "path-norm", "strength": 1}], PlanError, "penalty path-norm: .*path_norm_by_forward"),
    ],
)
def test_refusals_come_before_training(entries, error, says, tmp_path):
    name = "convolution" if entries[0].get("method") == "path-norm" else "mlp"
    with pytest.raises(error, match=says):
        train(recipe(tmp_path / "run", model={"name": f"{__name__}:{name}"}, penalties=entries))
    assert not (tmp_path / "run").exists()


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, (2, 3)), nn.Flatten())
