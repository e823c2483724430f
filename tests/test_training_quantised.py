"""Training of quantised weights: what the diagnostics say, stages, hooks and frozen parameters."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from pennyweight.errors import UnknownNameError
from pennyweight.estimators import make_estimator
from pennyweight.training.diagnostics import Diagnostics, estimating_error, histogram, totals
from pennyweight.training.loop import MODEL
from pennyweight.training.randomness import derived_seed
from training_runs import curve, import_zoo, run, stop_and_resume

pytestmark = pytest.mark.usefixtures("here")


class Signed(nn.Module):
    """A weight transform with an estimator in it."""

    def __init__(self, name="ste"):
        super().__init__()
        self.estimator = make_estimator(name)

    def forward(self, weight):
        return self.estimator(weight) * 0.3


def signed_layer():
    layer = nn.Sequential(nn.Linear(2, 1, bias=False))
    parametrize.register_parametrization(layer[0], "weight", Signed())
    return layer


def test_flips_and_oscillations_of_the_card():
    """Codes -,+,-,+ of one weight and a steady second one: 3 flips, 2 oscillations in 3 updates of 2 weights."""
    layer = signed_layer()
    latent = layer[0].parametrizations.weight.original
    meter = Diagnostics(layer)
    assert list(meter.layers) == ["0.weight"]
    for i, value in enumerate([-1.0, 1.0, -1.0, 1.0]):
        latent.data = torch.tensor([[value, 1.0]])
        meter.watch(updated=i > 0)
        layer(torch.ones(1, 2))
        layer(torch.ones(1, 2))  # a second part of the batch is no second update
        if i == 1:  # a checkpoint in between changes nothing
            tensors, plain = copy.deepcopy(meter.state_dict())
            meter.close()
            meter = Diagnostics(layer)
            meter.load_state_dict(tensors, json.loads(json.dumps(plain)))
    row = meter.report({}, histograms=False)["0.weight"]
    assert (row["updates"], row["flip_rate"], row["oscillation_rate"]) == (3, 3 / 6, 2 / 6)
    latent.data = torch.tensor([[-1.0, 1.0]])
    meter.watch(updated=False)  # a skipped step: whatever is seen is no flip of an update
    layer(torch.ones(1, 2))
    assert meter.report({}, histograms=False)["0.weight"]["updates"] == 3
    meter.reset()
    assert meter.report({}, histograms=False)["0.weight"]["flip_rate"] is None


def test_indicators_of_reste():
    """Card: z = (0.2, -0.5, 1.2, -0.9), o = 3: squared error 0.220065; and Var |g| unbiased."""
    estimator = make_estimator("reste")
    z = torch.tensor([0.2, -0.5, 1.2, -0.9], dtype=torch.float64)
    assert estimating_error(estimator, z) ** 2 == pytest.approx(0.220065, abs=1e-5)
    assert float(estimator.progress) == 0
    layer = signed_layer()
    meter = Diagnostics(layer)
    layer[0].parametrizations.weight.original.grad = torch.tensor([[1.0, -3.0]])
    assert meter.gradients() == {"0.weight": 2.0}
    rows = {"a": {"weights": 1, "updates": 2, "flip_rate": 0.5, "oscillation_rate": None, "estimating_error": 1.0}}
    rows["a"]["gradient_instability"] = 2.0
    rows["b"] = rows["a"] | {"weights": 3, "flip_rate": 0.0}
    assert totals(rows) == {
        "flip_rate": 0.125, "oscillation_rate": 0.0, "estimating_error": 2.0, "gradient_instability": 4.0,
    }  # fmt: skip


def test_histograms_keep_every_weight():
    found = histogram(torch.cat([torch.full((5,), 100.0), torch.linspace(-1, 1, 95)]))
    assert sum(found["counts"]) == 100
    assert found["counts"][-1] == 5
    assert histogram(torch.zeros(4)) == {"scale": 0.0, "counts": [4]}


BINARY = {"rules": [{"match": "5", "weight": {"method": "binary", "start": 0.5}, "input": {"method": "sign"}}]}


def lines_of(directory) -> list[dict]:
    return [json.loads(line) for line in Path(directory, "diagnostics.jsonl").read_text().splitlines()]


def test_two_stages_activations_then_weights(here, monkeypatch):
    """Weights turn binary at half of the progress, where the second stage begins; a resume there and later is exact."""
    stages = [{"steps": 6, "optimizer": {"lr": 0.1}, "schedule": {"name": "constant"}}, {"steps": 6}]
    changes = {"steps": None, "stages": stages, "prepare": BINARY, "log_every": 1, "schedule": {}, "ema": 0.5}
    result = run(**changes)
    rows = curve("run")
    assert [row["stage"] for row in rows] == ["0"] * 6 + ["1"] * 6
    assert [float(row["lr"]) for row in rows[:7]] == [0.1] * 6 + [0.02]
    assert all(row["flip_rate"] == "" for row in rows[:6])
    assert all(float(row["estimating_error"]) > 0 for row in rows[6:])
    assert all(float(row["flip_rate"]) >= 0 for row in rows[7:])
    assert [line["step"] for line in lines_of("run")] == [6, 10, 12]
    assert sum(lines_of("run")[0]["layers"]["5.weight"]["latent"]["counts"]) == 48
    assert result.report["packed_bytes"] == sum(
        (here / "run" / "packed" / name).stat().st_size for name in ("model.safetensors", "config.json")
    )
    stop_and_resume(monkeypatch, [6, 10], changes, rows)
    assert lines_of("stop10") == lines_of("stop6") == lines_of("run")


def test_a_recipes_hook_acts_from_its_share_of_the_training_on(here):
    """CGA with an empty band freezes the quantised weights from half of the steps on; the others go on learning."""
    rules = {"rules": [{"match": "5", "weight": {"method": "lsq", "bits": 2}}]}
    changes = {"prepare": rules, "schedule": {"name": "constant"}, "log_every": 1, "steps": 8}
    run(hooks=[{"method": "cga", "band": 0.0, "start": 0.5}], **changes)
    run(output="free", **changes)
    assert [row["loss"] for row in curve("run")[:5]] == [row["loss"] for row in curve("free")[:5]]
    assert [row["loss"] for row in curve("run")[6:]] != [row["loss"] for row in curve("free")[6:]]
    with pytest.raises(UnknownNameError, match="around the step"):
        run(output="none", hooks=[{"method": "cgb"}], **changes)


def test_frozen_parameters_stay_and_resume(here, monkeypatch):
    changes = {"freeze": {"0.*": 0.5}, "steps": 8, "log_every": 1}
    whole = run(**changes)
    fixed = run(output="fixed", **changes | {"freeze": {"0.*": 0}})
    torch.manual_seed(derived_seed(0, "model"))
    assert torch.equal(fixed.model[0].weight, import_zoo().mlp()[0].weight)
    assert not torch.equal(whole.model[0].weight, fixed.model[0].weight)
    stop_and_resume(monkeypatch, [5], changes, curve("run"))
    assert torch.equal(load_file("stop5/" + MODEL)["0.weight"], whole.model[0].weight)
