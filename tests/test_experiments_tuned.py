"""The experiments of LAWN, pWD, weight compander and PSiLON: their training is the recipe's, settings are found by
validation, every run is kept, and sentences follow the numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pennyweight.bench.experiments import lawn, psilon, pwd, pwd_tasks, weight_compander
from pennyweight.bench.experiments.command_line import REPOSITORY
from pennyweight.bench.experiments.denoise_affine import Text
from pennyweight.bench.experiments.pwd_tasks import TASKS
from pennyweight.bench.experiments.tuned_training import (
    Arm,
    Found,
    at_an_end,
    cached,
    changed,
    run,
    verdict,
    walk,
)
from pennyweight.bench.results import paired_difference
from pennyweight.optim import final_homogeneous
from pennyweight.training.loop import train
from pennyweight.training.settings import TrainingRecipe

EXPERIMENTS = "pennyweight.bench.experiments"


def points(count: int = 60) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(count, 6, generator=draw)
    y = x[:, :3].argmax(1)
    return {"train": (x[20:], y[20:]), "test": (x[:20], y[:20])}


def network() -> nn.Sequential:
    layers = [nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def small(**changes) -> TrainingRecipe:
    values = {
        "model": {"name": f"{__name__}:network"},
        "data": {"name": f"{__name__}:points", "validation": 16},
        "batch": 8,
        "steps": 7,
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"warmup": 0.3},
    }
    return TrainingRecipe.from_dict({**values, **changes})


LAWN = {"around": [{"method": "lawn", "free_steps": 0}]}
COMPANDER = {"rules": [{"match": "Linear", "weight": {"method": "weight-compander", "a": 3.0, "b": 2.0}}]}
PRUNED = {
    "name": f"{EXPERIMENTS}.pwd:magnitude_pruned",
    "options": {"model": f"{__name__}:network", "sparsity": 0.7, "at": 3, "each": False},
}
PSILON = {"name": "psilon_net", "options": {"inputs": 6, "outputs": 3, "width": 8, "hidden": 2, "sparsify": 0.5}}


# ------------------------------------------------------------------------------------------------------- the training


@pytest.mark.filterwarnings("ignore:the model is trained, but not packed")  # after a few steps nothing is zero
@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.1},
        {"steps": None, "stages": [{"steps": 3}, {"steps": 4, "optimizer": LAWN, "schedule": {"name": "linear"}}]},
        {"optimizer": {"name": "padamw", "lr": 1e-2, "weight_decay": 0.3, "options": {"p": 0.6, "ramp": 2}}},
        {"prepare": COMPANDER, "epochs": 1.5, "steps": None},
        {"model": PRUNED, "steps": None, "stages": [{"steps": 3}, {"steps": 4}]},
        {"model": PSILON, "penalties": [{"method": "path-norm", "strength": 0.1, "schedule": [[0, 0], [0.5, 1]]}]},
    ],
    ids=["clip", "lawn", "pwd", "compander", "pruned", "psilon"],
)
def test_what_is_measured_is_what_the_recipe_trains(changes, tmp_path):
    recipe = small(**changes)
    found = run(recipe)
    wanted = train(dataclasses.replace(recipe, output=str(tmp_path / "run")))
    state = wanted.model.state_dict()
    assert state.keys() == found.model.state_dict().keys()
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert found.test["accuracy"] == pytest.approx(100 * wanted.report["test"]["accuracy"])
    assert found.validation["loss"] == pytest.approx(wanted.report["validation"]["loss"])


def test_one_can_look_in_without_changing_anything():
    steps = []
    watched = run(small(), watch=lambda step, model, inputs, output, loss: steps.append((step, output.shape)))
    assert steps == [(step, (8, 3)) for step in range(7)]
    plain = run(small())
    assert all(torch.equal(a, b) for a, b in zip(watched.model.parameters(), plain.model.parameters()))


@pytest.mark.parametrize("each", [False, True])
def test_magnitude_pruning_takes_the_smallest_and_they_stay_zero(each):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    with torch.no_grad():
        inner[1].weight += 100
    model = pwd.MagnitudePruned(inner, 0.6, at=2, each=each)
    before = [weight.detach().clone() for weight in pwd.matrices(model)]
    model.after_step()
    assert all(torch.equal(a, b) for a, b in zip(before, pwd.matrices(model)))
    model.after_step()
    shares = [float((weight == 0).double().mean()) for weight in pwd.matrices(model)]
    assert shares == pytest.approx([0.6, 0.6] if each else [180 / 200, 0])
    for old, new in zip(before, pwd.matrices(model)):
        assert old[new == 0].abs().max() <= old[new != 0].abs().min() if bool((new == 0).any()) else True
        new.data.add_(1.0)
    model.after_step()
    assert [float((weight == 0).double().mean()) for weight in pwd.matrices(model)] == pytest.approx(shares)
    assert not any(bool((layer.bias == 0).any()) for layer in inner)


# ---------------------------------------------------------------------------------------------------- finding settings


def arm(**ladders) -> Arm:
    def recipe(settings, seed):
        values = {"optimizer.lr": settings["lr"], "optimizer.weight_decay": settings["decay"], "seed": seed}
        return changed(small(), values)

    return Arm("own", recipe, {"lr": (1, 2, 3, 4, 5), "decay": (0, 1, 2, 3), **ladders}, {"lr": (1, 2), "decay": (2,)})


def test_the_walk_ends_where_no_neighbour_is_better():
    measured = []

    def measure(recipe):
        measured.append((recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.seed))
        lr, decay = recipe.optimizer.lr, recipe.optimizer.weight_decay
        return {"validation": -((lr - 4) ** 2) - (decay - 1) ** 2 - 0.5 * (lr - 4) * (decay - 1), "seed": recipe.seed}

    found = walk(arm(), measure, lambda one: one["validation"], [7, 8, 9])
    assert found.settings == {"lr": 4, "decay": 1}
    assert found.values("seed") == [7, 8, 9]
    assert {(3, 1), (5, 1), (4, 0), (4, 2)} <= set(found.tried)
    assert {seed for lr, decay, seed in measured if (lr, decay) != (4, 1)} == {7}
    assert at_an_end(arm(), found) == []


def test_an_end_of_a_ladder_is_told_unless_it_is_nothing():
    found = walk(arm(), lambda r: {"v": r.optimizer.lr - r.optimizer.weight_decay}, lambda one: one["v"], [0])
    assert found.settings == {"lr": 5, "decay": 0}
    assert len(at_an_end(arm(), found)) == 1 and "lr 5" in at_an_end(arm(), found)[0]


def test_settings_that_diverge_are_the_worst():
    def measure(recipe):
        return {"v": math.nan if recipe.optimizer.lr < 4 or recipe.optimizer.weight_decay > 2 else -recipe.optimizer.lr}

    starts = dataclasses.replace(arm(), starts={"lr": (1, 5), "decay": (2,)})
    assert walk(starts, measure, lambda one: one["v"], [0]).settings == {"lr": 4, "decay": 2}


def test_runs_are_kept_by_what_their_recipe_says(tmp_path):
    calls = []

    def measure(recipe):
        calls.append(recipe)
        return {"value": len(calls)}

    again = cached(measure, tmp_path / "a")
    assert again(small())["value"] == again(small())["value"] == 1
    assert again(small(seed=1))["value"] == 2
    assert again(small(batch=4))["value"] == 3
    assert cached(measure, tmp_path / "a")(small())["value"] == 1


def test_changes_reach_into_a_recipe():
    recipe = changed(small(), {"optimizer.options.fused": True, "data.validation": 3, "steps": 2})
    assert recipe.optimizer.options == {"fused": True} and recipe.data.validation == 3 and recipe.steps == 2


def test_verdicts_follow_the_differences_seed_by_seed():
    assert paired_difference([2, 4, 6], [1, 2, 3]) == (2, pytest.approx(3**-0.5))
    assert verdict([2, 4, 6], [1, 2, 3]).endswith("better")
    assert verdict([1, 2, 3], [2, 4, 6]).endswith("worse")
    assert verdict([1, 2, 3], [3, 2, 1]).endswith("tell")
    assert verdict([2.0], [1.0]).endswith("tell")


# ------------------------------------------------------------------------------------------------------ what is trained


def test_sub_networks_are_those_that_the_page_of_lawn_names():
    images, pairs = torch.randn(4, 1, 14, 14), torch.zeros(4, 2, dtype=torch.long)
    assert final_homogeneous(lawn.image_mlp(), images) == ["6.weight", "4.weight"]
    recommender = lawn.recommender()
    assert final_homogeneous(recommender, pairs) == ["layers.4.weight", "layers.2.weight", "layers.0.weight"]


def test_ratings_are_classes_of_one_size_that_pairs_decide_but_for_noise():
    data = lawn.ratings()
    (train_pairs, train_classes), (test_pairs, _) = data["train"], data["test"]
    counts = torch.cat([classes for _, classes in data.values()]).bincount()
    assert len(counts) == lawn.CLASSES and int(counts.max() - counts.min()) <= 2
    seen = {tuple(pair) for pair in train_pairs.tolist()}
    assert len(seen) == len(train_pairs) and not seen & {tuple(pair) for pair in test_pairs.tolist()}
    means = torch.stack([train_classes[train_pairs[:, 1] == item].double().mean() for item in range(lawn.ITEMS)])
    assert float(means.std()) > 0.3  # an item of noise alone would spread by 1.4 / sqrt(60)


def test_a_window_of_the_text_is_followed_by_itself_moved_on_by_one(monkeypatch):
    ids = torch.arange(5000)
    monkeypatch.setattr(pwd_tasks, "load_text", lambda: Text(ids[:4000], ids[4000:4500], ids[4500:], 5000))
    monkeypatch.setattr(pwd_tasks, "characters", pwd_tasks.characters.__wrapped__)
    parts = pwd_tasks.characters()
    for inputs, targets in parts.values():
        assert torch.equal(inputs[:, 1:], targets[:, :-1]) and torch.equal(inputs[:, -1] + 1, targets[:, -1])
    assert int(parts["train"][1].max()) == 3999 and int(parts["test"][0].min()) >= 4500
    assert len(parts["train"][0]) == pwd_tasks.TRAIN + pwd_tasks.VALIDATION
    model = pwd_tasks.character_transformer()
    assert model(parts["train"][0][:2]).shape == (2, pwd_tasks.CONTEXT, 5000)


def test_friedmans_function_is_what_the_page_says():
    (x, y), _ = psilon.friedman()["train"], None
    u = x.double() / 12**0.5 + 0.5
    assert float(u.min()) >= 0 and float(u.max()) <= 1 and x.shape == (700, 50)
    clean = 10 * torch.sin(torch.pi * u[:, 0] * u[:, 1]) + 20 * (u[:, 2] - 0.5) ** 2 + 10 * u[:, 3] + 5 * u[:, 4]
    scale = float((y[:, 0] * clean).mean() - y.mean() * clean.mean()) / float(clean.var())
    noise = y[:, 0] / scale - clean
    assert float(noise.std()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("name", ["lawn", "pwd", "weight-compander", "psilon"])
def test_recipes_are_those_of_the_experiments(name):
    recipe = TrainingRecipe.load(REPOSITORY / "recipes" / f"{name}.yaml")
    assert TrainingRecipe.from_dict(recipe.to_dict()) == recipe
    if name == "lawn":
        every = [
            (base.name, base.recipe(first(base), 1)) for base in (*lawn.arms(recipe, True), *lawn.arms(recipe, False))
        ]
    elif name == "psilon":
        every = [(base.name, base.recipe(first(base), 1)) for base in psilon.arms(recipe)]
    elif name == "weight-compander":
        every = [(base.name, base.recipe(first(base), 1)) for base in weight_compander.arms(recipe)]
    else:
        every = [("p", pwd.decayed(recipe, 0.8, 0.1, 1e-3, 1)), ("a", pwd.adamw(recipe, 0.1, 1e-3, 1))]
    for label, one in every:
        assert one.seed == 1 and one.batch == recipe.batch and one.data == recipe.data, label
        assert _length(one) == pytest.approx(_length(recipe)), label


def first(base: Arm) -> dict[str, float]:
    return {name: values[0] for name, values in base.starts.items()}


def _length(recipe: TrainingRecipe) -> float:
    return sum(stage.steps or stage.epochs or 0 for stage in recipe.all_stages)


# ------------------------------------------------------------------------------------------------------------ sentences


def found(runs: list[dict], **settings: float) -> Found:
    return Found(settings, {tuple(settings.values()): 1.0}, runs)


def test_the_page_of_the_compander_says_what_its_runs_say():
    def runs(accuracy, kurtosis):
        pruned = {f"{s:g}": accuracy - 5 for s in weight_compander.SPARSITIES}
        return [
            {"test": accuracy + i, "kurtosis": kurtosis, "near zero": kurtosis / 30, "pruned": pruned} for i in (0, 1)
        ]

    lines = weight_compander.conclusions({"decay alone": found(runs(80, 4)), "compander and decay": found(runs(83, 3))})
    assert lines[0].endswith("better.") and "distribution shows" in lines[1] and lines[2].endswith("better.")
    lines = weight_compander.conclusions({"decay alone": found(runs(80, 3)), "compander and decay": found(runs(78, 4))})
    assert lines[0].endswith("worse.") and "does not show" in lines[1]


def test_the_page_of_pwd_says_what_its_runs_say():
    def point(test, zeros):
        return pwd.Point((0.1, 1e-3), [{"test": test + i, "validation": test, "zeros": zeros} for i in (0, 0.1)])

    results = {pwd.ADAMW: {0.0: point(85, 0.0)}, pwd.PRUNED: {level: point(82, level) for level in pwd.LEVELS}}
    for p in TASKS["images"].exponents:
        reached = {level: point(84.5 - p, level) for level in pwd.LEVELS} if p < 1 else {}
        results[f"p = {p:g}"] = {0.0: point(86 - abs(p - 1.5), 0.0), **reached}
    lines = pwd.conclusions("images", results)
    assert "p = 1.5, within 1 to 2" in lines[0] and lines[0].endswith("better.")
    assert all("p = 0.4" in line and line.endswith("better.") for line in lines[1 : 1 + len(pwd.LEVELS)])
    assert "p = 0.4 90 %" in lines[-4] and "p = 1 0 %" in lines[-4] and "as the paper" in lines[-3]
    for table in pwd.tables("images", results):
        table.markdown()


def test_the_pages_of_lawn_and_psilon_say_what_their_runs_say(tmp_path):
    def lawn_runs(accuracy, logits, gradient):
        last = {"loss": 0.1, "logits": logits, "gradient": gradient, "weights": 3.0}
        test = {"accuracy": accuracy, "loss": 0.4}
        curve = [[step, 0.1, logits, gradient, 3.0] for step in range(3)]
        return found([{"test": test, "last": last, "curve": curve}] * 2, lr=0.1)

    names = ("Adam", "AdamW", "LAWN-Adam", "SGD", "SGD + decay", "LAWN-SGD")
    good = {name: lawn_runs(88, 2, 1.0) if "LAWN" in name else lawn_runs(86, 6, 0.5) for name in names}
    results = {(task, batch): good for task, (_, batches) in lawn.TASKS.items() for batch in batches}
    lines = lawn.conclusions(results)
    assert sum(line.endswith("better.") for line in lines) == 16
    assert sum("adaptivity is kept" in line for line in lines) == 8 and sum("not less" in line for line in lines) == 4
    lawn.draw(results, tmp_path / "lawn.svg")
    assert 1000 < (tmp_path / "lawn.svg").stat().st_size < 100_000
    for table in (*lawn.accuracies(results), lawn.final_state(results)):
        table.markdown()

    recipe = TrainingRecipe.load(REPOSITORY / "recipes" / "lawn.yaml")
    tried = {"Adam": {(1e-3,): 1.0, (1e-2,): 2.0}, "LAWN-Adam": {(1e-2, 0.5): 1.0, (1e-2, 2.0): 3.0, (1e-1, 1.0): 2.0}}
    best = {name: dataclasses.replace(good[name], tried=values) for name, values in tried.items()}

    def measure(one):
        free = one.stages[0].epochs if one.stages else 0
        return {"last": {"logits": 6.0 if not free else 3.0 * free, "gradient": 0.5 + (free == 2)}}

    lines = lawn.at_equal_rates(lawn.arms(recipe, tables=True), best, measure, 0)
    assert len(lines) == 1 and lines[0].endswith("equal rates: 1.00 and 3.00 at 0.01.")

    def psilon_runs(test, zeros):
        return found([{"test": test, "zeros": zeros, "near": 0.2 + zeros, "path norm": 5.0}] * 2, lr=0.1)

    arms = {name: psilon_runs(-0.6, 0.0) for name in (psilon.STANDARD, psilon.NORMALISED, psilon.PRUNED)}
    arms |= {psilon.PSILON: psilon_runs(-0.5, 0.0), psilon.ZEROS: psilon_runs(-0.5, 0.9)}
    lines = psilon.conclusions("Friedman", arms)
    assert lines[0].endswith("better.") and "tell" in lines[2] and "90.0 %" in lines[2] and "better" in lines[3]
    psilon.table("Friedman", arms).markdown()


def test_shares_of_zeros_take_the_settings_that_reach_them_with_the_best_validation():
    asked = []

    def measure(recipe):
        optimizer = recipe.optimizer
        asked.append(recipe)
        zeros = min(1.0, 4 * optimizer.weight_decay) if optimizer.name == "padamw" else 0.0
        if "sparsity" in recipe.model.options:
            zeros = recipe.model.options["sparsity"]
        return {"zeros": zeros, "validation": 90 - 20 * zeros - abs(optimizer.lr - 3e-3), "test": 80.0}

    base = changed(TrainingRecipe.load(REPOSITORY / "recipes" / "pwd.yaml"), {"output": ""})
    results = pwd.compare(TASKS["images"], base, measure, [0, 1])
    chosen = {level: point.settings for level, point in results["p = 0.8"].items()}
    assert chosen == {0.0: (0.01, 3e-3), 0.5: (0.3, 3e-3), 0.8: (0.3, 3e-3), 0.9: (0.3, 3e-3)}
    assert set(results[pwd.PRUNED]) == set(pwd.LEVELS)
    steps = {_length(recipe) for recipe in asked if recipe.stages}
    assert steps == {round(base.epochs * (8192 // base.batch))}
    assert all(Path(recipe.output) == Path("") for recipe in asked)
