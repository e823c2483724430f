"""What the experiments on binary training share: small CIFAR-10, runs kept on disk, learning rates by validation.

A recipe file of `recipes/` says how a method is trained; an experiment trains it, and what it is compared with, for the
same steps on the same images. The learning rate of each comes from a grid of its own, by the accuracy on validation
images taken out of the training split, with the first seed; the test images have no part in it.

Every run is a directory below --runs whose name is a digest of its recipe: an interrupted experiment goes on where it
stopped, and two experiments share the baselines they have in common.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch.nn.functional as F

from ...progress import progress_bars
from ...training.data import Split, TrainingData, load_data
from ...training.loop import REPORT, train
from ...training.settings import DataSettings, TrainingRecipe
from ..results import Cell, Table

REPOSITORY = Path(__file__).parents[4]
#: Rows of every experiment: name -> (preset, or None for full precision; learning rates that are tried).
BASELINES: dict[str, tuple[str | None, Sequence[float]]] = {
    "full precision": (None, (3e-3, 1e-2)),
    "STE": ("bnn", (3e-3, 1e-2, 3e-2)),
}


@cache
def cifar10_halved(samples: int) -> dict[str, Split]:
    """CIFAR-10 at 16 x 16: the mean of each 2 x 2 pixels, rounded. samples: of the training split, the first ones."""
    return halved(load_data(DataSettings("cifar10", samples=samples), seed=0))


def halved(data: TrainingData) -> dict[str, Split]:
    """Images with the mean of each 2 x 2 pixels, rounded, in place of these; there must be a test split."""
    assert data.test is not None
    return {
        part: dataclasses.replace(split, inputs=F.avg_pool2d(split.inputs.float(), 2).round().byte())
        for part, split in (("train", data.train), ("test", data.test))
    }


@dataclass(frozen=True)
class Contender:
    """One row of an experiment: its name, how it is trained, and the learning rates that are tried."""

    name: str
    recipe: TrainingRecipe
    rates: Sequence[float]

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
    path: Path, method: str, rates: Sequence[float], baselines: Mapping[str, tuple[str | None, Sequence[float]]]
) -> list[Contender]:
    """The method of a recipe file, after its baselines: name -> (preset, or None for full precision, rates).

    Baselines differ from the recipe in `prepare` alone, but that they have no stages: all steps are of one.
    """
    recipe = TrainingRecipe.load(path)
    plain = dataclasses.replace(recipe, stages=(), steps=_steps(recipe))
    made = [
        Contender(name, dataclasses.replace(plain, prepare=None if preset is None else {"preset": preset}), grid)
        for name, (preset, grid) in baselines.items()
    ]
    return [*made, Contender(method, recipe, rates)]


def _steps(recipe: TrainingRecipe) -> int:
    return recipe.steps or sum(stage.steps or 0 for stage in recipe.stages)


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
    tried = {lr: trained(contender.at(lr, seeds[0], runs), contender.name) for lr in contender.rates}
    validation = {lr: 100 * report["validation"]["accuracy"] for lr, report in tried.items()}
    best = max(validation, key=lambda lr: validation[lr])
    reports = [tried[best], *(trained(contender.at(best, seed, runs), contender.name) for seed in seeds[1:])]
    found: dict[str, list[float]] = {
        key: [report["last"][key] for report in reports if key in report["last"]]
        for key in ("estimating_error", "gradient_instability")
    }
    accuracy = [100 * report["test"]["accuracy"] for report in reports]
    return Outcome(best, validation, accuracy, found["estimating_error"], found["gradient_instability"])


def trained(recipe: TrainingRecipe, name: str) -> dict[str, Any]:
    """The report of a run, from its directory if it has been trained already."""
    path = Path(recipe.output) / REPORT
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    with progress_bars() as progress:
        label = f"{name}, lr {recipe.optimizer.lr:g}, seed {recipe.seed}"
        return train(recipe, resume=True, progress=lambda _, done, total: progress(label, done, total)).report


def arguments_of(command: str, page: str, doc: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """--out, --runs and --seeds of an experiment."""
    parser = argparse.ArgumentParser(prog=command, description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results" / page)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "out" / "experiments", help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses the rate")
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


def at_the_edge(outcomes: Mapping[str, Outcome]) -> list[str]:
    """A sentence for each row whose learning rate is the least or the greatest of the grid: it may want another."""
    return [
        f"The learning rate of {name}, {found.lr:g}, is at the edge of the grid; a better one may lie beyond."
        for name, found in outcomes.items()
        if found.lr in (min(found.validation), max(found.validation))
    ]


def data_of(recipe: TrainingRecipe) -> str:
    """Which images, network and steps a recipe stands for, for the page."""
    samples, held_out, steps = recipe.data.options["samples"], recipe.data.validation, _steps(recipe)
    epochs = steps / ((samples - held_out) // recipe.batch)
    options = ", ".join(f"{key} {value}" for key, value in recipe.model.options.items())
    return (
        f"CIFAR-10 at 16 x 16 pixels, the first {samples:,} training images ({held_out:,} of them for validation, "
        f"drawn anew for each seed), all 10,000 test images; mirrored at random. {recipe.model.name} ({options}), "
        f"{steps:,} steps of {recipe.batch} images ({epochs:g} epochs), {recipe.optimizer.name}, "
        f"{recipe.schedule.name} schedule. First and last layer real."
    )
