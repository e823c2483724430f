"""What the experiments on binary training share: recipes of the rows, choice of the rate, runs kept, sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pennyweight as pw
from pennyweight.bench.experiments import binary_training, biper, recipe_runs
from pennyweight.bench.experiments.binary_training import (
    Contender,
    Outcome,
    at_equal_rates,
    compared,
    contenders,
    edges,
    measure,
    tables,
)
from pennyweight.bench.experiments.rates import tried_rates
from pennyweight.models.vgg_small import vgg_small
from pennyweight.training.data import Split
from pennyweight.training.settings import TrainingRecipe

RECIPES = binary_training.REPOSITORY / "recipes"


def images_of_two_kinds(count: int = 48) -> dict[str, Split]:
    """Dark ones and bright ones."""
    labels = torch.arange(count) % 2
    noise = torch.randint(60, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels = (noise + 180 * labels[:, None, None, None]).byte()
    split = Split(pixels, labels, (0.5,) * 3, (0.5,) * 3)
    return {"train": split, "test": split}


def small(**changes) -> TrainingRecipe:
    values = {
        "model": {"name": "resnet20", "options": {"num_classes": 2, "width": 2, "activation": "hardtanh"}},
        "data": {"name": f"{__name__}:images_of_two_kinds", "validation": 16},
        "batch": 8,
        "steps": 3,
        "prepare": {"preset": "reste"},
    }
    return TrainingRecipe.from_dict({**values, **changes})


@pytest.mark.parametrize("method", ["reste", "biper"])
def test_rows_of_a_recipe_file_differ_in_what_is_compared_alone(method):
    *baselines, own = contenders(RECIPES / f"{method}.yaml", "own", {})
    assert [row.recipe.prepare for row in baselines] == [None, {"preset": "bnn"}, {"preset": "bi-real"}]
    assert own.recipe.prepare == {"preset": method}
    for row in baselines:
        assert row.recipe.optimizer == own.recipe.optimizer
        assert row.recipe.steps == (own.recipe.steps or sum(stage.steps or 0 for stage in own.recipe.stages))
        assert (row.recipe.data, row.recipe.batch, row.recipe.schedule, row.recipe.model) == (
            own.recipe.data, own.recipe.batch, own.recipe.schedule, own.recipe.model,
        )  # fmt: skip


def test_the_variant_of_biper_differs_in_frequency():
    own, slow = contenders(RECIPES / "biper.yaml", "own", biper.VARIANTS)[-2:]
    plain, low = (pw.prepare(vgg_small(width=4, image_size=8), row.recipe.prepare or {}) for row in (own, slow))
    weights: list[Any] = [model.get_submodule("features.3.parametrizations.weight.0") for model in (plain, low)]
    assert [weight.estimator.omega for weight in weights] == [20.0, biper.OMEGA]
    assert weights[0].start == weights[1].start == pytest.approx(2 / 3)
    assert own.recipe.stages == slow.recipe.stages
    assert sum(stage.steps or 0 for stage in own.recipe.stages) == binary_training.STEPS


def test_recipes_of_both_pages_share_their_baselines(tmp_path):
    rows = [contenders(RECIPES / f"{method}.yaml", method, {}) for method in ("reste", "biper")]
    outputs = {row.at(1e-2, 1, tmp_path).output for both in rows for row in both}
    assert len(outputs) == 5  # three baselines, two methods


def test_a_rate_moves_the_rates_of_all_stages():
    recipe = small(
        steps=None,
        optimizer={"name": "adam", "lr": 1e-2},
        stages=[{"steps": 2}, {"steps": 1, "optimizer": {"lr": 2e-3}}],
    )
    made = Contender("own", recipe).at(3e-2, 5, Path("runs"))
    assert made.optimizer.lr == 3e-2 and made.seed == 5
    assert [stage.optimizer["lr"] for stage in made.stages] == pytest.approx([3e-2, 6e-3])
    assert made.output != Contender("own", recipe).at(3e-2, 6, Path("runs")).output


def test_every_run_is_trained_once_and_the_rate_chosen_by_validation(tmp_path, monkeypatch):
    trained = []
    original = recipe_runs.train

    def counted(recipe, **options):
        trained.append((recipe.optimizer.lr, recipe.seed))
        return original(recipe, **options)

    monkeypatch.setattr(recipe_runs, "train", counted)
    monkeypatch.setattr(binary_training, "LADDER", binary_training.RATES)
    contender = Contender("own", small())
    found = measure(contender, [0, 1, 2], tmp_path)
    assert found.lr == max(found.validation, key=lambda lr: found.validation[lr])
    assert sorted(trained) == sorted([*((lr, 0) for lr in binary_training.RATES), (found.lr, 1), (found.lr, 2)])
    assert len(found.accuracy) == len(found.error) == len(found.instability) == 3
    assert measure(contender, [0, 1, 2], tmp_path) == found and len(trained) == 4


@pytest.mark.parametrize(
    ("peak", "tried"),
    [(3, [2, 3, 4]), (2, [1, 2, 3]), (0, [0, 1, 2, 3]), (6, [2, 3, 4, 5, 6])],
    ids=["inside", "below", "first", "last"],
)
def test_rates_are_tried_until_the_best_is_inside(peak, tried):
    ladder = [10.0**power for power in range(7)]
    calls = []

    def score_at(rate: float) -> float:
        calls.append(rate)
        return -abs(ladder.index(rate) - peak)

    found = tried_rates(score_at, lambda score: score, ladder, (ladder[2], ladder[3]))
    assert list(found) == [ladder[at] for at in tried] and sorted(calls) == list(found)


def outcome(*accuracy: float, lr: float = 1e-2) -> Outcome:
    return Outcome(lr, {1e-3: 1.0, 1e-2: 2.0 if lr == 1e-2 else 1.0, 1e-1: 1.5}, list(accuracy), [], [])


def test_sentences_say_what_the_numbers_show():
    found = {"a": outcome(50, 51, 52), "b": outcome(47, 48.5, 49), "c": outcome(51, 50, 52, lr=1e-1)}
    assert compared(found, "a", "b").endswith("ahead.") and "+2.8 points" in compared(found, "a", "b")
    assert compared(found, "b", "a").endswith("behind.")
    assert compared(found, "a", "c").endswith("that these seeds can tell.")
    assert at_equal_rates(found, "c", "a").endswith("+0.0 points at 0.001, -1.0 points at 0.01, +0.0 points at 0.1.")
    assert len(edges(found)) == 1 and "of c" in edges(found)[0]
    for table in tables(found):
        table.markdown()
