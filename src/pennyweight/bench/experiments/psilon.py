"""PSiLON networks beside standard and weight-normalised ones with tuned decay: accuracy, exact zeros, 1-path-norm.

    python -m pennyweight.bench.experiments.psilon        (about five minutes on one core; goes on where it stopped)

1. Friedman's first function with 45 useless inputs beside its five, noise of variance 1, 200 training rows: error in
   standard deviations of the target.
2. 200 training rows of scikit-learn's digits: accuracy in percent.

Every arm is an MLP of three hidden layers of 100, trained for the same steps by recipes/psilon.yaml with another model,
and without its penalty where it says decay. Each has two settings, the learning rate and the strength of its decay or
penalty; see tuned_training.py for how they are found. The last quarter of the steps of "PSiLON, zeros" leads weights to
exact zeros; "standard, pruned" loses as many of its smallest weights as that one at 60 % of the steps and trains the
rest, its learning rate starting anew. Every seed draws other training and validation rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ...losses.path_norm import path_norm
from ...models.psilon_net import PSiLONNet
from ...training.settings import TrainingRecipe
from ...weights.psilon import near_sparsity
from ..results import Table, write_results
from .adaquant import digits
from .command_line import REPOSITORY, arguments_of
from .pwd import BEFORE_PRUNING, MagnitudePruned
from .tuned_training import Arm, Found, at_an_end, cached, changed, run, shown, verdict, walk

COMMAND = "python -m pennyweight.bench.experiments.psilon"
RECIPE = REPOSITORY / "recipes" / "psilon.yaml"
TRAIN, VALIDATION, TEST, INPUTS = 200, 500, 2000, 50
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
DECAYS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
STRENGTHS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
STANDARD, NORMALISED, PRUNED = "standard", "weight norm", "standard, pruned"
PSILON, ZEROS = "PSiLON", "PSiLON, zeros"


@cache
def friedman() -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of inputs uniform in 0..1, standardised, and targets [n, 1], standardised as the training rows are."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(TRAIN + VALIDATION + TEST, INPUTS, generator=draw)
    y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = y + torch.randn(len(y), generator=draw)
    y = ((y - y[:-TEST].mean()) / y[:-TEST].std())[:, None]
    x = (x - 0.5) * 12**0.5
    return {"train": (x[:-TEST], y[:-TEST]), "test": (x[-TEST:], y[-TEST:])}


@cache
def few_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images standardised as a whole [n, 64] and their classes."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = ((images - images.mean()) / images.std())[order], labels[order]
    first = TRAIN + VALIDATION
    return {"train": (images[:first], labels[:first]), "test": (images[first:], labels[first:])}


#: Task -> changes of the recipe.
TASKS: dict[str, dict[str, Any]] = {
    "Friedman": {},
    "digits": {
        "data.name": f"{__package__}.psilon:few_digits",
        "loss.name": "cross-entropy",
        "model.options.inputs": 64,
        "model.options.outputs": 10,
    },
}


def plain_mlp(inputs: int, outputs: int, width: int, hidden: int, normalised: bool = False) -> PSiLONNet:
    """The network of `psilon_net` with layers as torch makes them. normalised: L2 weight normalisation."""
    sizes = [inputs, *[width] * hidden, outputs]
    layers: list[nn.Module] = []
    for size, following in pairwise(sizes):
        layer = nn.Linear(size, following)
        layers += [parametrizations.weight_norm(layer) if normalised else layer, nn.ReLU()]
    return PSiLONNet(layers[:-1])


def measured(recipe: TrainingRecipe) -> dict[str, Any]:
    """Validation and test scores, the greater the better (accuracy in percent, or less the root of the squared error),
    share of exact zeros, near-sparsity of the rows, and the 1-path-norm."""
    trained = run(recipe)
    model = trained.model.model if isinstance(trained.model, MagnitudePruned) else trained.model
    weights = [layer.weight.detach() for layer in model.modules() if isinstance(layer, nn.Linear)]
    count = sum(weight.numel() for weight in weights)
    return {
        **{
            part: -(found["loss"] ** 0.5) if recipe.loss.name == "mse" else found["accuracy"]
            for part, found in (("validation", trained.validation), ("test", trained.test))
        },
        "zeros": sum(int((weight == 0).sum()) for weight in weights) / count,
        "near": float(torch.cat([near_sparsity(w[w.abs().sum(1) > 0]) for w in weights]).mean()),
        "path norm": path_norm(model).item(),
    }


def arms(base: TrainingRecipe) -> list[Arm]:
    """All but magnitude pruning, which waits for the number of zeros."""
    sizes = {name: value for name, value in base.model.options.items() if name != "sparsify"}

    def decayed(normalised: bool) -> Any:
        model = {"name": f"{__package__}.psilon:plain_mlp", "options": {**sizes, "normalised": normalised}}

        def recipe(settings: Mapping[str, float], seed: int) -> TrainingRecipe:
            optimizer = {
                "name": "adamw",
                "lr": settings["lr"],
                "weight_decay": settings["decay"],
                "options": {"fused": True},
            }
            return changed(base, {"seed": seed, "model": model, "optimizer": optimizer, "penalties": []})

        return recipe

    def psilon(sparsify: float | None) -> Any:
        def recipe(settings: Mapping[str, float], seed: int) -> TrainingRecipe:
            return changed(
                base,
                {
                    "seed": seed,
                    "model.options.sparsify": sparsify,
                    "optimizer.lr": settings["lr"],
                    "optimizer.options": {"fused": True},
                    "penalties": [{**base.penalties[0], "strength": settings["strength"]}],
                },
            )

        return recipe

    decays = {"lr": RATES, "decay": DECAYS}
    strengths = {"lr": RATES, "strength": STRENGTHS}
    start = {"lr": (1e-2,), "decay": (0.03, 0.3, 3.0), "strength": (1e-3, 1e-2, 1e-1)}
    return [
        Arm(STANDARD, decayed(False), decays, start),
        Arm(NORMALISED, decayed(True), decays, start),
        Arm(PSILON, psilon(None), strengths, start),
        Arm(ZEROS, psilon(base.model.options["sparsify"]), strengths, start),
    ]


def pruning(standard: Arm, zeros: float) -> Arm:
    """The standard arm that loses a share of its weights on the way."""

    def recipe(settings: Mapping[str, float], seed: int) -> TrainingRecipe:
        plain = standard.recipe(settings, seed)
        first = round(BEFORE_PRUNING * (plain.steps or 0))
        options = {
            "model": plain.model.name,
            "options": plain.model.options,
            "sparsity": round(zeros, 4),
            "at": first,
            "each": False,
        }
        return changed(
            plain,
            {
                "model": {"name": f"{__package__}.pwd:magnitude_pruned", "options": options},
                "steps": None,
                "stages": [{"steps": first}, {"steps": (plain.steps or 0) - first}],
            },
        )

    return Arm(PRUNED, recipe, standard.ladders, standard.starts)


Results = Mapping[str, Found]


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "psilon.md", __doc__, arguments, seeds=3, tasks=list(TASKS))
    recipe = changed(TrainingRecipe.load(RECIPE), {"output": ""})
    measure = cached(measured, options.runs / "psilon")
    found: dict[str, dict[str, Found]] = {}
    ends: list[str] = []
    for task in options.tasks:
        every = arms(changed(recipe, TASKS[task]))
        results: dict[str, Found] = {}
        for arm in every:
            results[arm.name] = walk(arm, measure, lambda one: one["validation"], options.seeds)
        every.append(pruning(every[0], fmean(results[ZEROS].values("zeros"))))
        results[PRUNED] = walk(every[-1], measure, lambda one: one["validation"], options.seeds)
        ends += [f"{task}: {line}" for arm in every for line in at_an_end(arm, results[arm.name])]
        found[task] = results
    write_results(
        options.out,
        title="PSiLON: L1-normalised weights and the 1-path-norm on little data (arXiv 2404.19112)",
        claim="networks of L1-normalised layers with a 1-path-norm penalty are strong on small, noisy data; their rows "
        "are nearly sparse, and most weights can become exactly zero at the end of training without loss.",
        tables=[table(task, results) for task, results in found.items()],
        command=options.command,
        seeds=options.seeds,
        data=f"{TRAIN} training rows and {VALIDATION} to choose settings by (first seed), drawn anew for each seed; "
        f"Friedman: made on the spot, {INPUTS} inputs, {TEST:,} test rows; digits of scikit-learn: the other 1,097. "
        f"MLP of three hidden layers of 100, {recipe.steps} steps of {recipe.batch} rows with Adam, linear schedule "
        f"with a fifth of warm-up. Ladders: rates {_told(RATES)}; decay {_told(DECAYS)}; strength {_told(STRENGTHS)}.",
        conclusion_lines=[*(line for task, results in found.items() for line in conclusions(task, results)), *ends],
    )
    print(options.out.read_text(encoding="utf-8"))


def _told(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def table(task: str, found: Results) -> Table:
    quality = "test error in standard deviations" if task == "Friedman" else "test accuracy in percent"
    return Table(
        f"{task}: {quality}; exact zeros in percent, near-sparsity (0 uniform, 1 one weight a row), 1-path-norm",
        ["arm", "settings", "error" if task == "Friedman" else "accuracy", "zeros, %", "near-sparsity", "path norm"],
        {
            name: [
                shown(one.settings),
                [abs(value) for value in one.values("test")],
                [100 * value for value in one.values("zeros")],
                one.values("near"),
                one.values("path norm"),
            ]
            for name, one in found.items()
        },
        digits=3 if task == "Friedman" else 2,
    )


def conclusions(task: str, found: Results) -> list[str]:
    """What the numbers say of the claim."""
    unit = "standard deviations (positive is better)" if task == "Friedman" else "points"

    def gain(method: str, baseline: str) -> str:
        return f"{task}: {method} against {baseline}: " + verdict(
            found[method].values("test"), found[baseline].values("test"), unit
        )

    def mean(arm: str, key: str) -> float:
        return fmean(found[arm].values(key))

    ratio = mean(PSILON, "near") / mean(STANDARD, "near")
    return [
        f"{gain(PSILON, STANDARD)}.",
        f"{gain(PSILON, NORMALISED)}.",
        f"{gain(ZEROS, PSILON)}, with {100 * mean(ZEROS, 'zeros'):.1f} % of the weights exactly zero.",
        f"{gain(ZEROS, PRUNED)}, at as many zeros.",
        f"{task}: PSiLON's near-sparsity is {ratio:.1f} times that of the standard network, its path norm "
        f"{mean(PSILON, 'path norm') / mean(STANDARD, 'path norm'):.2g} times, "
        f"and {mean(ZEROS, 'path norm') / mean(STANDARD, 'path norm'):.2g} times with zeros.",
    ]


if __name__ == "__main__":
    main()
