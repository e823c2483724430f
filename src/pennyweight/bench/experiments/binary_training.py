"""What the experiments on binary training share: network, images, baselines, runs kept on disk, the page.

A recipe file of `recipes/` says how a method trains a ResNet-20, which at a length that tells methods apart takes hours
on a CPU. An experiment trains by the same recipe a network that is deep and narrow, where the gradient's estimate
matters most, on small images, and at the same number of steps what the method is compared with: optimizer, schedule,
stages and `prepare` are the recipe's, model, data, batch and steps are those of `SETTING`.

All rows start from the same learning rates, and as long as the best of a row lies at the edge of those it has tried, it
tries the next (rates.py). The best is the one of the highest accuracy on validation images taken out of the training
split, with the first seed; the test images have no part in it.

Every run is a directory below --runs whose name is a digest of its recipe: an interrupted experiment goes on where it
stopped, and two experiments share the baselines.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...progress import progress_bars
from ...training.data import Split, load_data
from ...training.loop import REPORT, train
from ...training.settings import DataSettings, ModelSettings, TrainingRecipe
from ..results import Cell, Table, write_results
from .rates import at_the_edge, best_rate, tried_rates

REPOSITORY = Path(__file__).parents[4]
#: Learning rates that every row tries, and those that it may come to.
RATES = (3e-3, 1e-2)
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
STEPS = 1000
#: Of a recipe, what an experiment replaces.
SETTING: dict[str, Any] = {
    "model": ModelSettings(f"{__name__}:Narrow"),
    "data": DataSettings(f"{__name__}:fashion_mnist_halved", {"samples": 22_000}, validation=2_000),
    "batch": 64,
    "log_every": 250,
    "checkpoint_every": STEPS,
}
#: The first rows of every experiment: name -> preset, or None for full precision.
BASELINES: dict[str, str | None] = {"full precision": None, "STE": "bnn", "Bi-Real": "bi-real"}


class Narrow(nn.Module):
    """Images [n, 1, 14, 14] -> logits [n, 10]: a linear layer to `width`, `depth` of width x width, each of these with
    batch norm, and a classifier. Binary layers take the signs of what the norm gives; a real twin needs `hardtanh`
    there."""

    def __init__(self, width: int = 24, depth: int = 6, hardtanh: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(196, width, bias=False), nn.BatchNorm1d(width))
        self.hidden = nn.Sequential()
        for _ in range(depth):
            layer = nn.Linear(width, width, bias=False)
            nn.init.kaiming_normal_(layer.weight)
            self.hidden.extend([nn.Hardtanh() if hardtanh else nn.Identity(), layer, nn.BatchNorm1d(width)])
        self.last = nn.Sequential(nn.Hardtanh(), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.hidden(self.first(images)))


@cache
def fashion_mnist_halved(samples: int) -> dict[str, Split]:
    """Fashion-MNIST at 14 x 14: the mean of each 2 x 2 pixels, rounded. samples: of the training split, the first."""
    return _halved(DataSettings("fashion-mnist", samples=samples))


@cache
def cifar10_halved(samples: int) -> dict[str, Split]:
    """CIFAR-10 at 16 x 16, likewise."""
    return _halved(DataSettings("cifar10", samples=samples))


def _halved(settings: DataSettings) -> dict[str, Split]:
    data = load_data(settings, seed=0)
    assert data.test is not None

    def halved(split: Split) -> Split:
        return dataclasses.replace(split, inputs=F.avg_pool2d(split.inputs.float(), 2).round().byte())

    return {"train": halved(data.train), "test": halved(data.test)}


@dataclass(frozen=True)
class Contender:
    """One row of an experiment: its name, and how it is trained but for the learning rate."""

    name: str
    recipe: TrainingRecipe

    def at(self, lr: float, seed: int, runs: Path) -> TrainingRecipe:
        """Its recipe with that learning rate (those of later stages keep their ratio to it), seed and output."""
        base = self.recipe.optimizer.lr
        stages = tuple(
            dataclasses.replace(stage, optimizer={**stage.optimizer, "lr": stage.optimizer.get("lr", base) * lr / base})
            for stage in self.recipe.stages
        )
        optimizer = dataclasses.replace(self.recipe.optimizer, lr=lr)
        recipe = dataclasses.replace(self.recipe, optimizer=optimizer, stages=stages, seed=seed, output="")
        digest = hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
        return dataclasses.replace(recipe, output=str(runs / digest))


def contenders(
    path: Path, method: str, variants: Mapping[str, Callable[[TrainingRecipe], TrainingRecipe]]
) -> list[Contender]:
    """Baselines, the method of a recipe file, and variants of it: name -> what it makes of the method's recipe.

    Baselines differ from the recipe in `prepare` alone, but that they have no stages: all steps are of one.
    """
    own = _in_setting(TrainingRecipe.load(path))
    made = []
    for name, preset in BASELINES.items():
        recipe = in_one_stage(own)
        if preset is None:
            recipe = dataclasses.replace(recipe, prepare=None, model=ModelSettings(own.model.name, {"hardtanh": True}))
        else:
            recipe = dataclasses.replace(recipe, prepare={"preset": preset})
        made.append(Contender(name, recipe))
    return [*made, Contender(method, own), *(Contender(name, change(own)) for name, change in variants.items())]


def _in_setting(recipe: TrainingRecipe) -> TrainingRecipe:
    """Stages keep their shares of the steps."""
    if not recipe.stages:
        return dataclasses.replace(recipe, **SETTING, steps=STEPS)
    whole = sum(stage.steps or 0 for stage in recipe.stages)
    stages = tuple(
        dataclasses.replace(stage, steps=round(STEPS * (stage.steps or 0) / whole)) for stage in recipe.stages
    )
    return dataclasses.replace(recipe, **SETTING, stages=stages)


def in_one_stage(recipe: TrainingRecipe) -> TrainingRecipe:
    """The same steps under one schedule."""
    return dataclasses.replace(
        recipe, stages=(), steps=recipe.steps or sum(stage.steps or 0 for stage in recipe.stages)
    )


@dataclass(frozen=True)
class Outcome:
    """lr: the one chosen. validation: learning rate -> accuracy in percent with the first seed.

    One number a seed: test accuracy in percent, and of quantised weights the estimating error and the gradient
    instability of the last step (training/diagnostics.py), empty for full precision.
    """

    lr: float
    validation: dict[float, float]
    accuracy: list[float]
    error: list[float]
    instability: list[float]


def measure(contender: Contender, seeds: Sequence[int], runs: Path) -> Outcome:
    """Choose the learning rate with the first seed, then train with all of them."""

    def validation(lr: float) -> float:
        return 100 * trained(contender.at(lr, seeds[0], runs), contender.name)["validation"]["accuracy"]

    tried = tried_rates(validation, float, LADDER, RATES)
    best = best_rate(tried, float)
    reports = [trained(contender.at(best, seed, runs), contender.name) for seed in seeds]
    found: dict[str, list[float]] = {
        key: [report["last"][key] for report in reports if key in report["last"]]
        for key in ("estimating_error", "gradient_instability")
    }
    accuracy = [100 * report["test"]["accuracy"] for report in reports]
    return Outcome(best, tried, accuracy, found["estimating_error"], found["gradient_instability"])


def trained(recipe: TrainingRecipe, name: str) -> dict[str, Any]:
    """The report of a run, from its directory if it has been trained already."""
    path = Path(recipe.output) / REPORT
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    with progress_bars() as progress:
        label = f"{name}, lr {recipe.optimizer.lr:g}, seed {recipe.seed}"
        return train(recipe, resume=True, progress=lambda _, done, total: progress(label, done, total)).report


def arguments_of(
    command: str, page: str, doc: str | None, arguments: Sequence[str] | None, seeds: int = 3
) -> argparse.Namespace:
    """--out, --runs and --seeds of an experiment; seeds: how many by default."""
    parser = argparse.ArgumentParser(prog=command, description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results" / page)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "out" / "experiments", help="where runs are kept")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(seeds)), help="the first one chooses the rate"
    )
    return parser.parse_args(arguments)


def tables(outcomes: Mapping[str, Outcome]) -> list[Table]:
    """What is shown of every experiment: the comparison, and how the learning rates were chosen."""
    rows = {
        name: [f"{found.lr:g}", found.accuracy, found.error or "", _scientific(found.instability)]
        for name, found in outcomes.items()
    }
    rates = sorted({lr for found in outcomes.values() for lr in found.validation})
    tried: dict[str, list[Cell]] = {
        name: [found.validation.get(lr, "") for lr in rates] for name, found in outcomes.items()
    }
    return [
        Table(
            "Test accuracy in percent; the two indicators of ReSTE at the last step, over all binary weights",
            ["method", "learning rate", "accuracy", "estimating error", "gradient instability"],
            rows,
        ),
        Table(
            "Accuracy on the validation images in percent at each learning rate, first seed",
            ["method", *(f"{lr:g}" for lr in rates)],
            tried,
        ),
    ]


def _scientific(values: Sequence[float]) -> str:
    return f"{fmean(values):.1e}" if values else ""


def compared(outcomes: Mapping[str, Outcome], method: str, baseline: str) -> str:
    """Whether the method is ahead of the baseline, by the differences seed by seed, as a sentence."""
    differences = [a - b for a, b in zip(outcomes[method].accuracy, outcomes[baseline].accuracy)]
    mean = fmean(differences)
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    shows = mean > 2 * error
    return (
        f"{method} against {baseline}: {mean:+.1f} points, standard error {error:.1f} over {len(differences)} seeds: "
        + ("ahead." if shows else "behind." if mean < -2 * error else "no difference that these seeds can tell.")
    )


def ratio_of(values: Sequence[float], reference: Sequence[float]) -> float:
    """Of the means."""
    return fmean(values) / fmean(reference)


def at_equal_rates(outcomes: Mapping[str, Outcome], method: str, baseline: str) -> str:
    """How the two compare where nobody has tuned: on the validation images, at each learning rate that both tried."""
    own, other = outcomes[method].validation, outcomes[baseline].validation
    gains = {lr: own[lr] - other[lr] for lr in own if lr in other}
    return f"{method} against {baseline} at the same learning rate, validation, first seed: " + (
        ", ".join(f"{gain:+.1f} points at {lr:g}" for lr, gain in gains.items()) + "."
    )


def edges(outcomes: Mapping[str, Outcome]) -> list[str]:
    """A sentence for each row whose learning rate is the least or the greatest tried: the ladder ends there."""
    return [
        f"The learning rate of {name}, {found.lr:g}, is at the edge of those tried; a better one may lie beyond."
        for name, found in outcomes.items()
        if at_the_edge(found.lr, list(found.validation))
    ]


def _data_of(recipe: TrainingRecipe) -> str:
    """Images and training of all rows, for the page."""
    samples, held_out = recipe.data.options["samples"], recipe.data.validation
    return (
        f"Fashion-MNIST at 14 x 14 pixels, the first {samples:,} training images ({held_out:,} of them for validation, "
        f"drawn anew for each seed), all 10,000 test images. Six binary layers of 24 x 24 with batch norm between a "
        f"real layer from the pixels and a real classifier; {STEPS:,} steps of {recipe.batch} images, "
        f"{recipe.optimizer.name}, {recipe.schedule.name} schedule."
    )


def write_page(
    name: str,
    method: str,
    *,
    title: str,
    claim: str,
    doc: str | None,
    own_lines: Callable[[Mapping[str, Outcome]], list[str]],
    variants: Mapping[str, Callable[[TrainingRecipe], TrainingRecipe]] | None = None,
    arguments: Sequence[str] | None,
) -> None:
    """Train the rows of recipes/NAME.yaml and write docs/results/NAME.md.

    method: the row's name of what the recipe trains. variants: further rows, see `contenders`. doc: of the experiment's
    module. own_lines: what the numbers say of the method beside the comparisons of accuracy. arguments: of the command
    line.
    """
    command = f"python -m pennyweight.bench.experiments.{name}"
    options = arguments_of(command, f"{name}.md", doc, arguments, seeds=5)
    rows = contenders(REPOSITORY / "recipes" / f"{name}.yaml", method, variants or {})
    found = {row.name: measure(row, options.seeds, options.runs) for row in rows}
    write_results(
        options.out,
        title=title,
        claim=claim,
        tables=tables(found),
        command=command,
        seeds=options.seeds,
        data=_data_of(rows[0].recipe),
        conclusion_lines=[
            *(compared(found, name, base) for name in (method, *(variants or {})) for base in ("STE", "Bi-Real")),
            *(at_equal_rates(found, name, "STE") for name in (method, *(variants or {}))),
            compared(found, "Bi-Real", "STE"),
            compared(found, "STE", "full precision"),
            *own_lines(found),
            *edges(found),
        ],
    )
    print(options.out.read_text(encoding="utf-8"))
