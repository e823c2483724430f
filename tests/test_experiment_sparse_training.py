"""The experiment on sparse training: what is trained, how it is chosen, and sentences that follow the numbers."""

from __future__ import annotations

import dataclasses

import torch

from pennyweight.bench.experiments import sparse_training
from pennyweight.bench.experiments.sparse_training import (
    KNOBS,
    SHRUNK,
    File,
    Run,
    best_within,
    chosen_rate,
    compared,
    conclusions,
    draw,
    network,
    recipe_of,
    tables,
    within,
)
from pennyweight.training.settings import TrainingRecipe


def test_recipes_differ_in_what_is_compared_alone(tmp_path, monkeypatch):
    before = []
    monkeypatch.setattr(sparse_training, "trained", lambda recipe, name: before.append(recipe))
    base = dataclasses.replace(TrainingRecipe.load(sparse_training.RECIPE), shrink=None)
    recipes = {name: recipe_of(Run(name, knobs[0], 3e-3, 5), tmp_path) for name, knobs in KNOBS.items()}
    for name, recipe in recipes.items():
        assert (recipe.data, recipe.batch, recipe.schedule, recipe.seed) == (base.data, base.batch, base.schedule, 5)
        assert recipe.optimizer.lr == 3e-3
        assert recipe.steps == (base.steps if name != "pruned" else base.steps // 2)
        assert recipe.model == base.model or name == "pruned"
    assert recipes["pWD, p = 0.5"].optimizer.options == {**base.optimizer.options, "p": 0.5}
    assert recipes["l1 penalty"].penalties[0]["strength"] == KNOBS["l1 penalty"][0]
    assert recipes["dense"].optimizer.name == "adamw" and not recipes["dense"].penalties
    (dense,) = before
    assert dense.steps + recipes["pruned"].steps == base.steps
    assert recipes["pruned"].model.options == {"dense": dense.output, "amount": KNOBS["pruned"][0]}
    assert len({recipe.output for recipe in [*recipes.values(), dense]}) == len(KNOBS) + 1


def test_a_cut_costs_at_most_a_quarter_of_a_point():
    model = network()
    weight = model[7].get_parameter("weight")
    with torch.no_grad():
        weight.fill_(1)
        weight.view(-1)[:4] = torch.tensor([2e-5, 2e-4, 2e-3, 2e-2])
    judged = {0: 90.0, 1: 89.9, 2: 89.7}  # zeros in that layer -> accuracy

    def judge(twin):
        return judged.get(int((twin[7].weight == 0).sum()), 0.0)

    for convolution in (model[0], model[3], model[9]):
        torch.nn.init.ones_(convolution.weight)
    assert int((sparse_training._cut(model, judge)[7].weight == 0).sum()) == 1
    judged[2] = 89.75
    assert int((sparse_training._cut(model, judge)[7].weight == 0).sum()) == 2
    judged[1] = judged[2] = 0.0
    assert int((sparse_training._cut(model, judge)[7].weight == 0).sum()) == 0 == int((weight == 0).sum())


def file(nbytes: int, zeros: float, accuracy: float) -> File:
    return File(nbytes, zeros, accuracy, accuracy - 0.5)


def test_choices_are_made_on_validation_within_the_bytes():
    files = {0.1: file(9000, 0.9, 85), 0.2: file(5000, 0.95, 84), 0.3: file(2000, 0.98, 70)}
    assert within(files, 10_000) == 0.1 and within(files, 6000) == 0.2 and within(files, 1999) is None
    slow = {0.1: file(12_000, 0.8, 89), 0.2: file(7000, 0.9, 80)}
    assert chosen_rate({1.0: files, 2.0: slow}, (20_000, 10_000, 5500)) == 1.0
    assert chosen_rate({1.0: files, 2.0: slow}, (20_000,)) == 2.0
    curves = {"a": {0.1: [file(9000, 0.9, 85), file(10_500, 0.9, 86)], 0.2: [file(5000, 0.95, 84)] * 2}}
    assert best_within(curves, "a", 9800) == curves["a"][0.1] and best_within(curves, "a", 9000) == curves["a"][0.2]
    assert best_within(curves, "a", 100) is None


def results(pwd: float, half: float = 87.2):
    """Curves and shrunk files in which p = 0.8 has that accuracy, and p = 0.5 is sparser or not than p = 1."""
    curves = {
        name: {k: [file(8000, 0.9, 87 + 0.1 * seed) for seed in range(3)] for k in knobs[:1]}
        for name, knobs in KNOBS.items()
    }
    curves["pWD, p = 0.8"] = {0.1: [file(7000, 0.95, pwd + 0.1 * seed) for seed in range(3)]}
    curves["pWD, p = 0.5"] = {0.1: [file(9000, 0.99, half)] * 3}
    curves["dense"] = {0.0: [file(200_000, 0.0, 88.0)] * 3}
    shrunk = {f"{name}, {size}": [file(size, 0.5, 80 + i)] * 3 for i, name in enumerate(KNOBS) for size in SHRUNK}
    return curves, shrunk


def test_sentences_say_what_the_numbers_say(tmp_path):
    rates = dict.fromkeys(KNOBS, sparse_training.RATES[0])
    ahead, behind = (conclusions(rates, *results(pwd)) for pwd in (87.9, 85.0))
    assert "against pruned +0.9 points" in ahead[0] and "ahead" in ahead[0] and ahead[0] != behind[0]
    assert any("does best" in line and "l1 penalty" not in line.split("does best")[0] for line in ahead)
    assert "shows." in next(line for line in ahead if line.startswith("Sparsest"))
    assert "does not show." in next(
        line for line in conclusions(rates, *results(80, 80)) if line.startswith("Sparsest")
    )
    assert "At the edge" in ahead[-1] and "dense" in ahead[-1]
    assert compared([file(1, 0, 80)] * 3, [file(1, 0, 80)] * 3).endswith("no difference that these seeds can tell")
    curves, shrunk = results(87.9)
    pages = [table.markdown() for table in tables(rates, curves, shrunk)]
    assert "pWD, p = 0.8, 0.1" in pages[0] and len(pages) == 3
    draw(tmp_path / "curves.svg", curves, shrunk)
    text = (tmp_path / "curves.svg").read_text()
    assert "pWD, p = 0.8" in text and len(text) < 100_000
    draw(tmp_path / "again.svg", curves, shrunk)
    assert (tmp_path / "again.svg").read_text() == text
