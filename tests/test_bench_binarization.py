"""BiBench's metrics by hand, the corruptions' and data generators' invariants, and the benchmark from end to end."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from pennyweight.bench.binarization import grid, metrics, surfaces
from pennyweight.bench.binarization.architectures import ARCHITECTURES, architecture, published
from pennyweight.bench.binarization.benchmark import benchmark
from pennyweight.bench.binarization.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from pennyweight.bench.binarization.data import accuracy, task_data
from pennyweight.bench.binarization.grid import FULL, QUICK, carry_out, make_runs
from pennyweight.bench.binarization.observed import bits_of_values, observed_precision
from pennyweight.bench.binarization.page import page, radar_points
from pennyweight.bench.binarization.runs import REAL, Deployment, Training, execute
from pennyweight.bench.binarization.scores import TRACKS, make_card
from pennyweight.bench.binarization.sounds import FRAMES, MELS, RATE, keywords, log_mel
from pennyweight.cli import app
from pennyweight.cost import CostTable, LayerCost, cost_table
from pennyweight.errors import DataError, MissingExtraError, PlanError, UnknownNameError
from pennyweight.layers.precision import Precision
from pennyweight.training.building import make_model
from pennyweight.training.prepare import prepare
from pennyweight.training.schedule import set_progress
from pennyweight.training.settings import ModelSettings

# ------------------------------------------------------------------------------------------------------------- metrics


def test_accuracy_of_two_tasks_by_hand():
    cells = {"a": ([0.45, 0.45], [0.5, 0.5]), "b": ([0.4], [0.5])}
    assert metrics.accuracy_score(cells) == pytest.approx(0.851469, abs=1e-6)


def test_complexity_by_hand():
    """100 parameters and 100 multiplications, ten of them real: the card's r_c, r_s and their overall metric."""
    binary, real = Precision(1, 1), Precision()
    table = CostTable([LayerCost("a", "linear", 90, 90, 90, binary), LayerCost("b", "linear", 10, 10, 10, real)], 0)
    assert table.compression == pytest.approx(7.804878, abs=1e-6)
    assert table.speedup == pytest.approx(8.767123, abs=1e-6)
    assert metrics.complexity_score([table.compression], [table.speedup]) == pytest.approx(8.299957, abs=1e-6)
    assert metrics.complexity_score([32], [64]) == pytest.approx(50.596443, abs=1e-6)


def test_robustness_training_and_inference_by_hand():
    lost = {"fog": ([0.2, 0.1], [0.1, 0.1]), "snow": ([0.4], [0.1])}
    assert metrics.robustness_score(lost, floor=0.001) == pytest.approx(math.sqrt((0.75**2 + 0.25**2) / 2))
    assert metrics.robustness_score({"fog": ([0.0], [0.1])}, floor=0.01) == pytest.approx(10)  # nothing to lose
    score = metrics.training_score(([2.0, 4.0], [1.0, 1.0]), ([0.2], [0.1]), floor=0.001)
    assert score == pytest.approx(math.sqrt((0.375**2 + 0.5**2) / 2))
    assert metrics.inference_score(([1.0], [3.0]), ([1], [4])) == pytest.approx(math.sqrt((9 + 16) / 2))
    assert metrics.inference_score(([math.inf], [3.0]), ([math.inf], [4])) == 0


def test_a_twin_scores_one_on_every_track():
    same = ([0.3, 0.7], [0.3, 0.7])
    assert metrics.accuracy_score({"a": ([0.0], [0.0])}, floor=0.1) == 0  # a twin that knows nothing divides nothing
    for score in (
        metrics.accuracy_score({"a": same}),
        metrics.robustness_score({"a": same}, 0.01),
        metrics.training_score(same, same, 0.01),
        metrics.complexity_score([1.0], [1.0]),
        metrics.inference_score(same, same),
    ):
        assert score == pytest.approx(1)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.randoms())
def test_quadratic_mean_lies_between_mean_and_largest_in_any_order(values, random):
    found = metrics.quadratic_mean(values)
    assert sum(values) / len(values) <= found * (1 + 1e-12)
    assert found <= max(values) * (1 + 1e-12)
    random.shuffle(values)
    assert metrics.quadratic_mean(values) == pytest.approx(found)


def test_metrics_refuse_what_is_missing():
    with pytest.raises(ValueError, match="no values"):
        metrics.quadratic_mean([])
    with pytest.raises(ValueError, match="2 numbers cannot be divided by 1"):
        metrics.mean_ratio([1, 2], [1])


# --------------------------------------------------------------------------------------------------------- corruptions


def photographs(n=6, size=32, channels=3):
    """Smooth colours with edges, as in photographs."""
    generator = np.random.default_rng(3)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [
        np.sin(2 * np.pi * (generator.uniform(0.5, 3) * x + generator.uniform(0.5, 3) * y) + generator.uniform(0, 6))
        + (x > generator.uniform(0.2, 0.8))
        for _ in range(n * channels)
    ]
    return ((np.stack(waves).reshape(n, channels, size, size).transpose(0, 2, 3, 1) + 1) * 85).astype(np.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_grows_with_severity_and_repeats(kind):
    images = photographs()
    kept = images.copy()
    made = [corrupt(images, kind, severity, seed=1) for severity in SEVERITIES]
    assert all(m.dtype == np.uint8 and m.shape == images.shape for m in made)
    distances = [np.abs(m.astype(float) - images).mean() for m in made]
    assert np.all(np.diff([0, *distances]) > 0), distances
    np.testing.assert_array_equal(images, kept)
    np.testing.assert_array_equal(made[2], corrupt(images, kind, 3, seed=1))


def test_corruptions_of_odd_grey_images():
    images = photographs(2, 29, 1)[:, :, :27]
    for kind in CORRUPTIONS:
        assert corrupt(images, kind, 5).shape == images.shape


def test_corruptions_that_are_the_identity_on_some_images():
    flat = np.full((2, 16, 16, 3), 120, np.uint8)
    for kind in ("contrast", "pixelate", "zoom blur", "motion blur", "defocus blur", "glass blur", "elastic"):
        np.testing.assert_array_equal(corrupt(flat, kind, 5), flat, err_msg=kind)


def test_corruptions_by_hand():
    images = photographs()
    brighter = corrupt(images, "brightness", 3).astype(float)
    wanted = np.minimum(images.max(-1) + 0.15 * 255, 255)
    np.testing.assert_allclose(brighter.max(-1), wanted, atol=0.51)
    x = images.astype(float)
    mean = x.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(corrupt(images, "contrast", 5), (x - mean) * 0.15 + mean, atol=0.51)
    changed = corrupt(np.full((4, 64, 64, 3), 100, np.uint8), "impulse noise", 5)
    assert np.isin(changed, (0, 100, 255)).all()
    assert (changed != 100).mean() == pytest.approx(0.07, abs=0.005)


def test_corruptions_refuse():
    images = photographs(1)
    with pytest.raises(UnknownNameError, match="did you mean 'snow'"):
        corrupt(images, "snw", 1)
    with pytest.raises(DataError, match="severity 6"):
        corrupt(images, "snow", 6)
    with pytest.raises(DataError, match="float64"):
        corrupt(images / 255, "snow", 1)


# ---------------------------------------------------------------------------------------------------------------- data


def test_keywords_are_balanced_and_repeat():
    features, labels = keywords(30, seed=5)
    assert features.shape == (30, 1, FRAMES, MELS)
    assert labels.bincount().tolist() == [3] * 10
    torch.testing.assert_close(features.mean((1, 2, 3)), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std((1, 2, 3)), torch.ones(30), atol=1e-2, rtol=0)
    again, _ = keywords(30, seed=5)
    assert torch.equal(features, again)
    assert not torch.equal(features, keywords(30, seed=6)[0])


def test_a_higher_tone_lights_a_higher_band():
    time = np.arange(4096) / RATE
    bands = log_mel(np.stack([np.sin(2 * np.pi * f * time) for f in (300, 900, 2700)])).mean(1).argmax(1)
    assert bands[0] < bands[1] < bands[2]


def test_points_fall_uniformly_on_a_surface():
    """Two triangles of areas 1 and 3; in each, the mean of the points is its centre."""
    triangles = np.array([[[0, 0, 0], [2, 0, 0], [0, 1, 0]], [[0, 0, 5], [6, 0, 5], [0, 1, 5]]], float)
    points = surfaces.sample_surface(triangles, 40_000, np.random.default_rng(0))
    upper = points[:, 2] > 2
    assert upper.mean() == pytest.approx(0.75, abs=0.01)
    for part, corners in ((~upper, triangles[0]), (upper, triangles[1])):
        np.testing.assert_allclose(points[part].mean(0), corners.mean(0), atol=0.03)


def test_clouds_fill_the_unit_ball():
    points, labels = surfaces.clouds(40, 32, seed=2)
    assert points.shape == (40, 3, 32)
    assert labels.bincount().tolist() == [4] * 10
    torch.testing.assert_close(points.norm(dim=1).amax(1), torch.ones(40))
    torch.testing.assert_close(points.mean(2), torch.zeros(40, 3), atol=0.35, rtol=0)
    assert torch.equal(points, surfaces.clouds(40, 32, seed=2)[0])


def test_training_and_test_samples_differ_and_seeds_share_the_test():
    a, b = task_data("solids", 20, 10, 0), task_data("solids", 20, 10, 1)
    assert torch.equal(a.test.inputs, b.test.inputs)
    assert not torch.equal(a.train.inputs, b.train.inputs)
    assert not torch.equal(a.train.inputs[:10], a.test.inputs)
    with pytest.raises(UnknownNameError, match="solids"):
        task_data("solid", 20, 10, 0)


def test_accuracy_of_an_unbalanced_task():
    predicted, labels = torch.zeros(10, dtype=torch.long), torch.tensor([0] * 8 + [1] * 2)
    assert accuracy(predicted, labels) == pytest.approx(0.8)
    assert accuracy(predicted, labels, balanced=True) == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------------------- bits


def test_bits_are_those_of_the_values_that_pass():
    signs = torch.randn(4, 64).sign() * torch.rand(4, 1)
    assert bits_of_values(signs) == 1
    assert bits_of_values(torch.arange(64.0).remainder(4).expand(3, 64)) == 2
    assert bits_of_values(torch.randn(4, 64)) == 32
    assert bits_of_values(torch.randn(4, 3).sign()) == 32  # three signs could be chance


class Signs(nn.Module):
    def forward(self, x):
        return torch.where(x >= 0, 1.0, -1.0)


def test_precision_is_seen_whatever_the_layer_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Signs(), nn.Linear(16, 16), nn.Linear(16, 2))
    nn.utils.parametrize.register_parametrization(model[2], "weight", Signs())
    model[2].bits = 8
    found = observed_precision(model, torch.randn(8, 16))
    assert found == {"0": Precision(), "2": Precision(1, 1), "3": Precision()}
    table = cost_table(model, [torch.randn(8, 16)], found)
    assert table.macs == 16 * 16 * 2 + 32
    assert table.operations == 16 * 16 + 32 + 16 * 16 / 64


def test_products_inside_a_layer_are_no_layers():
    class Outer(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return super().forward(self.inner(x).sign())

    assert list(observed_precision(nn.Sequential(Outer(), nn.Linear(4, 2)), torch.randn(3, 4))) == ["0", "1"]


def test_noise_that_is_over_is_no_cost():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    prepare(model, {"preset": "fda"})
    inputs = torch.randn(8, 16)
    assert observed_precision(model, inputs)["1"] == Precision()
    set_progress(model, 1.0)
    assert observed_precision(model, inputs)["1"] == Precision(1, 1)


# -------------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_built_and_run(name):
    options, inputs = published(name, 2)
    small = architecture(name).options(tuple(inputs.shape[1:]), 10)
    model = make_model(ModelSettings(architecture(name).factory, small))
    assert model.eval()(inputs).shape == (2, 10)
    for pattern in architecture(name).real:
        assert any(re.fullmatch(pattern.replace("*", ".*"), n) for n, _ in model.named_modules())
    with torch.device("meta"):
        make_model(ModelSettings(architecture(name).factory, options))


# ----------------------------------------------------------------------------------------------------------- end to end

TINY = replace(
    QUICK, name="tiny", steps=2, consumption_steps=2, batch=8, train=16, test=10, deployed=("pointnet",), patience=0.01
)


def test_the_grid_holds_every_method_with_its_twin():
    runs = make_runs(FULL, [REAL, "bnn"], grid.CONSUMPTION_TASKS)
    assert len(set(runs)) == len(runs) == 2 * (3 * (6 + 3) + 4 * 2 + 6)
    assert all(replace(run, method=REAL) in runs for run in runs)
    assert {run.task for run in runs if isinstance(run, Training) and run.severities} == {"cifar10"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    return benchmark(directory, TINY, ["bnn"], ["keywords"])


def test_every_method_gets_a_card(finished):
    assert finished.complete
    assert [card.method for card in finished.cards] == [REAL, "bnn"]
    for track, score in finished.cards[0].scores.items():
        assert score is None if track == "robustness" else score == pytest.approx(1), track
    bnn = finished.cards[1]
    assert bnn.scores["complexity"] > 10
    assert bnn.deployed["pointnet"]["bytes"] < bnn.deployed["pointnet"]["real_bytes"] / 10
    assert not bnn.refused
    assert json.loads((finished.directory / "results.json").read_text()) == finished.to_dict()


def test_the_page_stands_alone(finished):
    text = finished.page.read_text()
    assert not re.search(r"https?:|src=|<script|<link|@import|url\(", text)
    assert text.count("<polygon") == 5  # one method: four rings and an outline
    for name in ("bnn", *TRACKS.values()):
        assert name.replace(" ", "<br>") in text


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    monkeypatch.setattr(grid, "execute", lambda *_: pytest.fail("it is there already"))
    again = benchmark(finished.directory, TINY, ["bnn"], ["keywords"])
    assert again.to_dict() == finished.to_dict()


def test_a_killed_benchmark_goes_on(finished, tmp_path, monkeypatch):
    """Half of the files, one of them torn: the rest is run, and nothing else."""
    (tmp_path / "runs").mkdir()
    files = sorted((finished.directory / "runs").iterdir())
    for file in files[::2]:
        (tmp_path / "runs" / file.name).write_bytes(file.read_bytes())
    torn = tmp_path / "runs" / files[0].name
    torn.write_text(torn.read_text()[:50])
    done = []
    results = {}
    for file in files:
        stored = json.loads(file.read_text())
        results[json.dumps(stored["run"], sort_keys=True)] = stored["result"]

    def recorded(run, method):
        done.append(run)
        return results[json.dumps(vars(run), sort_keys=True)]

    monkeypatch.setattr(grid, "execute", recorded)
    again = benchmark(tmp_path, TINY, ["bnn"], ["keywords"])
    assert len(done) == len(files) - len(files[::2]) + 1
    assert again.to_dict()["methods"] == finished.to_dict()["methods"]
    assert not list((tmp_path / "runs").glob("*.part"))


def test_other_rules_under_the_same_name_are_run_anew(tmp_path, monkeypatch):
    runs, seen = [Deployment("pointnet", "mine", 0.01)], []
    monkeypatch.setattr(grid, "execute", lambda run, method: seen.append(method) or {"compression": 1.0})
    for rules in ({"rules": [1]}, {"rules": [1]}, {"rules": [2]}):
        carry_out(runs, {"mine": rules}, tmp_path)
    assert seen == [{"rules": [1]}, {"rules": [2]}]


def test_a_method_that_refuses_counts_as_nothing():
    """Rules that no layer matches: refused with the reason, and scored zero where its twin scores one."""
    run = Training("task", "solids", "pointnet", "none", "adam", 1e-3, "cosine", 2, 8, 16, 10, 0)
    refused = execute(run, {"rules": [{"match": ["Conv3d"], "weight": {"method": "binary"}}]})
    assert "matches no layer" in refused["refused"]
    card = make_card("none", {run: refused, replace(run, method=REAL): {"accuracy": 0.5, "seconds": 1.0}})
    assert card.scores["task"] == 0
    assert card.scores["inference"] is None
    assert card.refused == [f"pointnet: {refused['refused']}"]


def test_a_bug_of_one_method_does_not_cost_the_night(tmp_path, monkeypatch):
    runs = [Deployment("pointnet", name, 0.01) for name in ("good", "bad")]

    def execute_or_fail(run, method):
        if run.method == "bad":
            raise IndexError("off by one")
        return {"compression": 2.0}

    monkeypatch.setattr(grid, "execute", execute_or_fail)
    with pytest.warns(UserWarning, match="bad pointnet deployment failed .* off by one"):
        found = carry_out(runs, {"good": None, "bad": None}, tmp_path)
    assert list(found) == runs[:1]
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_workers_need_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    run = Training("task", "solids", "pointnet", REAL, "adam", 1e-3, "cosine", 2, 8, 16, 10, 0)
    with pytest.raises(MissingExtraError, match=r"pennyweight\[distributed\]"):
        carry_out([run], {REAL: None}, tmp_path, workers=2)


def pretend(run):
    """A result without the work."""
    if isinstance(run, Training):
        return {"accuracy": 0.5, "seconds": 1.0}
    measured = {"seconds": 1.0, "real_seconds": 2.0, "bytes": 10, "real_bytes": 100} if run.method != REAL else {}
    return {"compression": 30.0, "speedup": 50.0, **measured}


def test_a_recipe_joins_by_its_file(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("rules: [{match: Conv2d, weight: {method: binary}, input: {method: sign}}]\n")
    seen = {}
    monkeypatch.setattr(grid, "execute", lambda run, method: seen.update({run.method: method}) or pretend(run))
    found = benchmark(tmp_path / "out", TINY, [str(recipe)], ["keywords"])
    assert [card.method for card in found.cards] == [REAL, "mine"]
    assert seen == {
        REAL: None,
        "mine": {"rules": [{"match": ["Conv2d"], "weight": [{"method": "binary"}], "input": {"method": "sign"}}]},
    }
    with pytest.raises(PlanError, match="same name"):
        benchmark(tmp_path / "out", TINY, [str(recipe), str(recipe)], ["keywords"])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "execute", lambda run, method: pretend(run))
    out = str(tmp_path / "out")
    common = ["bench", "binarization", "-o", out, "--quick", "--task", "keywords", "--method", "bnn"]
    found = CliRunner().invoke(app, [*common, "--json"])
    assert found.exit_code == 0, found.output
    assert [m["method"] for m in json.loads(found.stdout)["methods"]] == [REAL, "bnn"]
    shown = CliRunner().invoke(app, common)
    assert "index.html" in shown.stdout.replace("\n", "")
    wrong = CliRunner().invoke(app, [*common, "--task", "keyword"])
    assert wrong.exit_code == 2
    assert CliRunner().invoke(app, [*common, "--method", "bnm"]).exit_code == 2


def test_a_regular_radar():
    points = radar_points([1, 0.5, 0, 1, 1, 1], 10)
    assert points[0] == pytest.approx((0, -10))
    assert points[1] == pytest.approx((5 * math.sin(math.pi / 3), -2.5))
    assert points[2] == pytest.approx((0, 0))
    assert points[3] == pytest.approx((0, 10))


def test_a_page_of_missing_tracks():
    card = make_card(REAL, {})
    facts = {
        "profile": "quick",
        "runs": 0,
        "versions": "",
        "machine": {"instruction_set": "", "processor": "<&>", "threads": 1},
    }
    assert set(card.scores.values()) == {None}
    assert "&lt;&amp;&gt;" in page([card, replace(card, method="<b>")], facts)
