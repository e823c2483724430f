"""The weight compander beside tuned weight decay alone, and what magnitude pruning leaves of both.

    python -m pennyweight.bench.experiments.weight_compander        (about three minutes on one core)

An MLP on 2,048 images of Fashion-MNIST at 14 x 14 pixels, trained as recipes/weight-compander.yaml has it, with and
without its `prepare`. Learning rate and decay of both are found by walking the same ladders (tuned_training.py); the
compander has a third one, the width b of its curve in root mean squares of a layer, a staying 1.5 b. Afterwards the
smallest weights of all matrices together become zero, without more training. Data: PENNYWEIGHT_DATA, default
../shared/data beside the repository.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...training.data import load_data
from ...training.fold import fold
from ...training.settings import TrainingRecipe
from ..results import Table, write_results
from .command_line import REPOSITORY, arguments_of
from .tuned_training import Arm, Found, at_an_end, cached, changed, run, score, shown, verdict, walk

COMMAND = "python -m pennyweight.bench.experiments.weight_compander"
RECIPE = REPOSITORY / "recipes" / "weight-compander.yaml"
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DECAYS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
#: In root mean squares of a layer: a weight below it counts as near zero.
NEAR = 0.1
PLAIN, COMPANDED = "decay alone", "compander and decay"


def measured(recipe: TrainingRecipe) -> dict[str, Any]:
    """Accuracies in percent, also after pruning (sparsity -> test accuracy), and the shape of the weights, on average
    over layers: kurtosis, share near zero, and the largest in root mean squares."""
    trained = run(recipe)
    model = fold(copy.deepcopy(trained.model)) if recipe.prepare is not None else trained.model
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    scaled = [weight / weight.square().mean().sqrt() for weight in weights]
    test = load_data(recipe.data, recipe.seed).test
    assert test is not None
    after = {}
    for sparsity in SPARSITIES:  # rising: what is zero stays zero
        prune(weights, sparsity)
        after[f"{sparsity:g}"] = score(model, test, recipe)["accuracy"]
    return {
        "validation": trained.validation["accuracy"],
        "test": trained.test["accuracy"],
        "loss": trained.test["loss"],
        "pruned": after,
        "kurtosis": fmean(float(((w - w.mean()) ** 4).mean() / w.var(correction=0) ** 2) for w in scaled),
        "near zero": fmean(float((w.abs() < NEAR).float().mean()) for w in scaled),
        "largest": fmean(float(w.abs().max()) for w in scaled),
    }


def prune(weights: Sequence[Tensor], sparsity: float) -> None:
    """The smallest of all of them together become zero, in place."""
    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = sizes.kthvalue(round(sparsity * len(sizes))).values
    for weight in weights:
        weight.mul_(weight.abs() > threshold)


def arms(recipe: TrainingRecipe) -> list[Arm]:
    assert recipe.prepare is not None
    rule = recipe.prepare["rules"][0]
    ratio = rule["weight"]["a"] / rule["weight"]["b"]

    def plain(settings: Mapping[str, float], seed: int) -> TrainingRecipe:
        changes = {"seed": seed, "optimizer.lr": settings["lr"], "optimizer.weight_decay": settings["decay"]}
        return changed(recipe, {**changes, "prepare": None})

    def companded(settings: Mapping[str, float], seed: int) -> TrainingRecipe:
        weight = {**rule["weight"], "a": ratio * settings["b"], "b": settings["b"]}
        return changed(plain(settings, seed), {"prepare": {"rules": [{**rule, "weight": weight}]}})

    ladders = {"lr": RATES, "decay": DECAYS}
    start = {"lr": (1e-1,), "decay": (3e-4, 3e-3, 3e-2), "b": (2.0,)}
    return [Arm(PLAIN, plain, ladders, start), Arm(COMPANDED, companded, {**ladders, "b": WIDTHS}, start)]


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "weight-compander.md", __doc__, arguments, seeds=5)
    recipe = changed(TrainingRecipe.load(RECIPE), {"output": ""})
    measure = cached(measured, options.runs / "weight-compander")
    both = arms(recipe)
    found = {arm.name: walk(arm, measure, lambda one: one["validation"], options.seeds) for arm in both}
    kinds = ("kurtosis", "near zero", "largest")
    write_results(
        options.out,
        title="Weight compander: a bounded curve of each weight beside tuned decay (arXiv 2306.16993)",
        claim="a curve that bounds weights and is steep at zero improves networks beside the usual regularisers; it "
        "pushes weights away from zero and cuts the tails. (Formula and tables of the paper could not be read.)",
        tables=[
            Table(
                "Test accuracy in percent and loss, and the shape of the weights, on average over layers",
                ["arm", "settings", "accuracy", "loss", "kurtosis", f"share below {NEAR:g} rms", "largest, rms"],
                {
                    name: [
                        shown(one.settings),
                        one.values("test"),
                        one.values("loss"),
                        *(one.values(kind) for kind in kinds),
                    ]
                    for name, one in found.items()
                },
                3,
            ),
            Table(
                "Test accuracy in percent after magnitude pruning of all matrices together, without more training",
                ["arm", *(f"{100 * sparsity:g} % zeros" for sparsity in SPARSITIES)],
                {name: [one.values("pruned", f"{s:g}") for s in SPARSITIES] for name, one in found.items()},
            ),
        ],
        command=COMMAND,
        seeds=options.seeds,
        data="Fashion-MNIST at 14 x 14 pixels, 2,048 training images, 4,096 others to choose settings by accuracy "
        "(first seed), 5,000 test images; MLP 196-128-128-10, first layer batch-normalised, "
        f"{recipe.epochs:g} epochs of batches of {recipe.batch}, SGD with Nesterov momentum. "
        f"{len(found[PLAIN].tried)} settings tried for {PLAIN}, {len(found[COMPANDED].tried)} for {COMPANDED}.",
        conclusion_lines=[*conclusions(found), *(line for arm in both for line in at_an_end(arm, found[arm.name]))],
    )
    print(options.out.read_text(encoding="utf-8"))


def conclusions(found: Mapping[str, Found]) -> list[str]:
    plain, companded = found[PLAIN], found[COMPANDED]
    lines = [f"Test accuracy against {PLAIN}: {verdict(companded.values('test'), plain.values('test'))}."]
    before, after = fmean(plain.values("kurtosis")), fmean(companded.values("kurtosis"))
    near = fmean(companded.values("near zero")) / fmean(plain.values("near zero"))
    lines.append(
        f"The kurtosis of the weights goes from {before:.2f} to {after:.2f} and the share near zero to {near:.2f} "
        "times that without: the effect on the distribution "
        f"{'shows' if after < before and near < 1 else 'does not show'}."
    )
    for sparsity in SPARSITIES:
        told = verdict(companded.values("pruned", f"{sparsity:g}"), plain.values("pruned", f"{sparsity:g}"))
        lines.append(f"After pruning {100 * sparsity:g} % of the weights: {told}.")
    return lines


if __name__ == "__main__":
    main()
