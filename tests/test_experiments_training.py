"""What the experiments on binary training share: recipes of the rows, choice of the rate, runs kept, sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pennyweight.bench.experiments import cifar_training
from pennyweight.bench.experiments.cifar_training import (
    BASELINES,
    Contender,
    Outcome,
    at_the_edge,
    compared,
    contenders,
    measure,
    tables,
)
from pennyweight.training.data import Split
from pennyweight.training.settings import TrainingRecipe

RECIPES = cifar_training.REPOSITORY / "recipes"


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
    plain, baseline, own = contenders(RECIPES / f"{method}.yaml", "own", (1e-2,), BASELINES)
    assert plain.recipe.prepare is None and baseline.recipe.prepare == {"preset": "bnn"}
    assert own.recipe.prepare == {"preset": method}
    for row in (plain, baseline):
        assert row.recipe.steps == (own.recipe.steps or sum(stage.steps or 0 for stage in own.recipe.stages))
        assert (row.recipe.data, row.recipe.model, row.recipe.batch, row.recipe.schedule) == (
            own.recipe.data, own.recipe.model, own.recipe.batch, own.recipe.schedule,
        )  # fmt: skip


def test_recipes_of_both_pages_share_their_baselines(tmp_path):
    rows = [contenders(RECIPES / f"{method}.yaml", method, (1e-2,), BASELINES)[1] for method in ("reste", "biper")]
    outputs = {row.at(1e-2, 1, tmp_path).output for row in rows}
    assert len(outputs) == 1


def test_a_rate_moves_the_rates_of_all_stages():
    recipe = small(
        steps=None,
        optimizer={"name": "adam", "lr": 1e-2},
        stages=[{"steps": 2}, {"steps": 1, "optimizer": {"lr": 2e-3}}],
    )
    made = Contender("own", recipe, ()).at(3e-2, 5, Path("runs"))
    assert made.optimizer.lr == 3e-2 and made.seed == 5
    assert [stage.optimizer["lr"] for stage in made.stages] == pytest.approx([3e-2, 6e-3])
    assert made.output != Contender("own", recipe, ()).at(3e-2, 6, Path("runs")).output


def test_every_run_is_trained_once_and_the_rate_chosen_by_validation(tmp_path, monkeypatch):
    trained = []
    original = cifar_training.train

    def counted(recipe, **options):
        trained.append((recipe.optimizer.lr, recipe.seed))
        return original(recipe, **options)

    monkeypatch.setattr(cifar_training, "train", counted)
    contender = Contender("own", small(), (1e-4, 1e-2))
    found = measure(contender, [0, 1], tmp_path)
    assert found.lr == max(found.validation, key=lambda lr: found.validation[lr])
    assert sorted(trained) == sorted([(1e-4, 0), (1e-2, 0), (found.lr, 1)])
    assert len(found.accuracy) == len(found.error) == len(found.instability) == 2
    assert measure(contender, [0, 1], tmp_path) == found and len(trained) == 3


def outcome(*accuracy: float, lr: float = 1e-2) -> Outcome:
    return Outcome(lr, {1e-3: 1.0, 1e-2: 2.0, 1e-1: 1.5}, list(accuracy), [], [])


def test_sentences_say_what_the_numbers_show():
    found = {"a": outcome(50, 51, 52), "b": outcome(47, 48.5, 49), "c": outcome(51, 50, 52, lr=1e-1)}
    assert compared(found, "a", "b").endswith("ahead.") and "+2.8 points" in compared(found, "a", "b")
    assert compared(found, "b", "a").endswith("behind.")
    assert compared(found, "a", "c").endswith("that these seeds can tell.")
    assert len(at_the_edge(found)) == 1 and "of c" in at_the_edge(found)[0]
    for table in tables(found):
        table.markdown()
