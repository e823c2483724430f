"""The experiments on methods that control weights: data, costs and arms are what their pages call them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.bench.experiments import a_fan, eman, mimicnorm, parallel_nn, residual_depth, supervised
from pennyweight.bench.experiments import weight_standardization as standardised
from pennyweight.bench.experiments.kept import kept
from pennyweight.bench.experiments.recipe_runs import Contender
from pennyweight.errors import PlanError
from pennyweight.layers.norm_free import NORMS
from pennyweight.training.data import Split
from pennyweight.training.loop import train
from pennyweight.training.settings import TrainingRecipe


def test_measured_once(tmp_path):
    calls = []

    def measure() -> dict[str, int]:
        calls.append(1)
        return {"n": len(calls)}

    assert kept(tmp_path, {"a": 1, "b": [2]}, measure) == {"n": 1} == kept(tmp_path, {"b": [2], "a": 1}, measure)
    assert kept(tmp_path, {"a": 2}, measure) == {"n": 2}


# ------------------------------------------------------------------------------------------------------- parallel_nn


@pytest.mark.parametrize("function", parallel_nn.FUNCTIONS)
def test_functions_have_unit_deviation_and_seeds_change_the_noise_alone(function):
    one, two = (parallel_nn.observe(function, 2048, seed) for seed in (0, 1))
    assert one.truth.std() == pytest.approx(1, abs=0.01) and np.array_equal(one.truth, two.truth)
    assert not np.array_equal(one.y, two.y)
    for values in (one.y, one.validation, two.y):
        assert (values - one.truth).std() == pytest.approx(parallel_nn.NOISE, rel=0.05)
    assert abs(np.mean((one.y - one.truth) * (one.validation - one.truth))) < 0.1 * parallel_nn.NOISE**2


def test_trend_filtering_meets_its_conditions_of_optimality():
    """y - b = D' u with |u| <= lambda, and u = lambda sign(D b) wherever D b is not zero; D' u fixes u."""
    data = parallel_nn.observe("blocks", 24, 0)
    for (degree, lam), fit in parallel_nn.trend_filtering(data.x, data.y):
        differences = np.diff(np.eye(24), degree + 1, axis=0)
        u = np.linalg.lstsq(differences.T, data.y - fit, rcond=None)[0]
        assert np.allclose(differences.T @ u, data.y - fit, atol=1e-6)
        assert np.abs(u).max() <= lam * (1 + 1e-4)
        bends = differences @ fit
        there = np.abs(bends) > 1e-6
        assert np.allclose(u[there], lam * np.sign(bends[there]), rtol=1e-3)


def test_methods_without_a_penalty_interpolate():
    data = parallel_nn.observe("heavisine", 64, 0)
    unthresholded = [fit for choice, fit in parallel_nn.wavelets(data.x, data.y) if choice[-1] == 0]
    assert len(unthresholded) > 4 and all(np.allclose(fit, data.y) for fit in unthresholded)
    assert np.allclose(next(iter(parallel_nn.splines(data.x, data.y)))[1], data.y, atol=1e-3)


def test_networks_are_trained_as_the_loop_would(tmp_path):
    recipe = TrainingRecipe.load(parallel_nn.RECIPE)
    recipe = dataclasses.replace(recipe, steps=12, output=str(tmp_path / "run"))
    x = parallel_nn.noisy_samples()["train"][0]
    assert torch.allclose(parallel_nn.fitted(recipe)(x), train(recipe).model(x), atol=1e-4)
    for network in parallel_nn.NETWORKS:
        options = {**recipe.model.options, **parallel_nn.NETWORKS[network]}
        model = parallel_nn.make_model(dataclasses.replace(recipe.model, options=options))
        assert sum(p.numel() for p in model.parameters()) == parallel_nn._parameters(network)


# -------------------------------------------------------------------------------------------------- trained classifiers


def two_kinds() -> dict[str, Split]:
    """Dark images and bright ones."""
    labels = torch.arange(48) % 2
    noise = torch.randint(60, (48, 1, 14, 14), generator=torch.Generator().manual_seed(0))
    split = Split((noise + 180 * labels[:, None, None, None]).byte(), labels, (0.5,), (0.5,))
    return {"train": split, "test": split}


def test_rows_are_chosen_by_validation_and_divergence_counts_as_guessing(tmp_path):
    recipe = TrainingRecipe.from_dict(
        {
            "model": {
                "name": "pennyweight.bench.experiments.residual_depth:residual_mlp",
                "options": {"blocks": 2, "scale": 1.0},
            },
            "data": {"name": f"{__name__}:two_kinds", "validation": 16},
            "batch": 8,
            "steps": 8,
            "log_every": 2,
            "optimizer": {"name": "sgd", "lr": 1.0},
            "schedule": {"name": "constant"},
        }
    )
    row = supervised.measure(Contender("own", recipe, (1e-2, 1e30)), [0, 1], tmp_path)
    assert row.rate == 1e-2 and row.validation[1e30] is None and row.validation[1e-2] is not None
    assert row.diverged == 0 and all(map(math.isfinite, row.loss)) and min(row.accuracy) > 60
    lost = supervised.measure(Contender("own", recipe, (1e30,)), [0, 1], tmp_path)
    assert lost.diverged == 2 and list(lost.accuracy) == [10, 10]
    assert supervised.accuracy_cell(lost) == "diverged in 2 of 2" and supervised.loss_cell(lost) == ""
    supervised.rates_table({"a": row, "b": lost}).markdown()
    assert len(supervised.at_the_edge({"a": row, "b": lost})) == 1


def test_verdicts_follow_the_numbers():
    assert supervised.verdict([50, 51, 52], [40, 41.5, 42]).endswith(": ahead")
    assert supervised.verdict([40, 41, 42], [50, 51.5, 52]).endswith(": behind")
    assert supervised.verdict([40, 45, 50], [50, 45, 40]).endswith("that these seeds can tell")


def test_deep_networks_grow_as_their_scales_say():
    sizes = {name: residual_depth.growth(30, options, 0) for name, options in residual_depth.ROWS.items()}
    assert sizes[residual_depth.SKIP] == 1 and sizes[residual_depth.NONE] > 1e4
    assert 1 < sizes[residual_depth.INVERSE] < sizes[residual_depth.SQRT] < math.e**1.5
    model = residual_depth.residual_mlp(3, **residual_depth.ROWS[residual_depth.SQRT])
    assert not any(isinstance(module, NORMS) for module in model.modules())
    kept_norms = residual_depth.residual_mlp(3, **residual_depth.ROWS[residual_depth.NORM])
    assert sum(isinstance(module, NORMS) for module in kept_norms.modules()) == 6


def test_rows_of_small_batches_see_as_many_images():
    small, large = (standardised.contender("BCN + WS", batch).recipe for batch in (2, 16))
    assert small.steps and large.steps and abs(small.steps * small.batch - large.steps * large.batch) < 16
    rates = [standardised.contender("GN", batch).rates for batch in (2, 4)]
    assert rates[1] == pytest.approx([2 * rate for rate in rates[0]])
    kinds = {norm: standardised.small_resnet(norm) for norm in ("batch", "group", "batch-channel")}
    counts = [sum(isinstance(m, nn.GroupNorm) for m in model.modules()) for model in kinds.values()]
    assert counts == [0, 5, 0] and len({len(list(model.parameters())) for model in kinds.values()}) == 2
    with pytest.raises(PlanError, match="norm is 'layer'"):
        standardised.small_resnet("layer")
    with pytest.raises(PlanError, match="norms is 'batches'"):
        mimicnorm.resnet14("batches")


def test_bytes_kept_for_the_backward():
    """Of Linear its input, of a ReLU its output, of the second Linear that output again."""
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    assert mimicnorm.kept_for_backward(model, torch.randn(3, 5)) == 4 * (3 * 5 + 3 * 7)
    images = torch.randn(2, 1, 14, 14)
    less, more = (mimicnorm.kept_for_backward(mimicnorm.resnet14(norms), images) for norms in ("none", "batch"))
    assert less < more


# ----------------------------------------------------------------------------------------------------- eman and a-fan


def test_skewed_batches_hold_few_classes_and_strong_copies_a_hole():
    classes = torch.arange(1000) % 10
    torch.manual_seed(0)
    assert len(classes[eman.skewed_rows(classes, 80)].unique()) == eman.SKEWED_CLASSES
    copies = eman.strong(torch.ones(6, 196))
    assert torch.equal((copies == 0).sum(1), torch.full((6,), 25))


def test_costs_and_attacks():
    assert a_fan.cost(a_fan.PLAIN) == 1 < a_fan.cost(a_fan.RANDOM) < a_fan.cost("A-FAN, 0.2") < 3
    assert a_fan.steps_of(a_fan.LONGER) == round(a_fan.STEPS * a_fan.cost("A-FAN, 0.2"))
    torch.manual_seed(0)
    model = a_fan.network(a_fan.PLAIN).eval()
    x, y = torch.randn(4, 1, 14, 14), torch.tensor([0, 1, 2, 3])
    for steps in (1, 10):
        away = (a_fan.on_images(model, steps)(x, y) - x).abs().max() * a_fan.DEVIATION
        assert float(away) == pytest.approx(a_fan.REACH, rel=1e-4)
    features = model.head(x)
    random = a_fan.network(a_fan.RANDOM)
    change = random.attack(features, y) - features
    assert torch.allclose(change.abs(), (0.2 * features.square().mean().sqrt()).expand_as(change), atol=1e-5)
    assert 0.3 < float((change > 0).double().mean()) < 0.7
