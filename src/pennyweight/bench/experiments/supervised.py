"""What the experiments on trained classifiers share: rows that differ in what is named, each at its best learning rate.

Every row is a recipe, trained for the same steps by `pennyweight train` at every rate of one grid with the first seed,
chosen by the accuracy on validation images, and trained again with the other seeds at that rate. The test images have
no part in the choice. A run whose loss is no longer finite has diverged, and counts as no better than guessing.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...training.data import Split, load_data
from ...training.loop import train
from ...training.settings import DataSettings, TrainingRecipe
from ..results import Cell, Table, paired_difference, told_apart
from .kept import kept
from .recipe_runs import Contender, halved


@cache
def fashion_mnist_halved(samples: int) -> dict[str, Split]:
    """Fashion-MNIST at 14 x 14: the mean of each 2 x 2 pixels, rounded. samples: of the training split, the first."""
    return halved(load_data(DataSettings("fashion-mnist", samples=samples), seed=0))


@dataclass(frozen=True)
class Row:
    """rate: the one chosen. validation: learning rate -> accuracy in percent with the first seed, None if it diverged.

    One entry a seed: test accuracy in percent, and the mean training loss of the last interval that was logged.
    """

    rate: float
    validation: Mapping[float, float | None]
    accuracy: Sequence[float]
    loss: Sequence[float]
    diverged: int


def run(recipe: TrainingRecipe, classes: int, runs: Path) -> dict[str, Any]:
    """Accuracies in percent and the last training loss; accuracies of guessing and no loss if it diverged."""

    def measure() -> dict[str, Any]:
        shutil.rmtree(recipe.output, ignore_errors=True)
        try:
            report = train(recipe).report
        except DataError as error:
            if "the loss is" not in str(error):
                raise
            return {"validation": 100 / classes, "test": 100 / classes, "loss": None}
        accuracies = {part: 100 * report[part]["accuracy"] for part in ("validation", "test")}
        return {**accuracies, "loss": report["last"]["loss"]}

    settings = {key: value for key, value in recipe.to_dict().items() if key != "output"}
    return kept(runs, settings, measure)


def measure(contender: Contender, seeds: Sequence[int], runs: Path, classes: int = 10) -> Row:
    """Choose the learning rate with the first seed, then train with all of them."""

    def at(rate: float, seed: int) -> dict[str, Any]:
        found = run(contender.at(rate, seed, runs), classes, runs)
        print(contender.name, rate, seed, found, file=sys.stderr, flush=True)
        return found

    tried = {rate: at(rate, seeds[0]) for rate in contender.rates}
    best = max(tried, key=lambda rate: (tried[rate]["loss"] is not None, tried[rate]["validation"]))
    every = [tried[best], *(at(best, seed) for seed in seeds[1:])]
    return Row(
        best,
        {rate: None if found["loss"] is None else found["validation"] for rate, found in tried.items()},
        [found["test"] for found in every],
        [math.inf if found["loss"] is None else found["loss"] for found in every],
        sum(found["loss"] is None for found in every),
    )


def accuracy_cell(row: Row) -> Cell:
    return f"diverged in {row.diverged} of {len(row.accuracy)}" if row.diverged else row.accuracy


def loss_cell(row: Row) -> Cell:
    return "" if row.diverged else row.loss


def rates_table(rows: Mapping[str, Row]) -> Table:
    """How the learning rates were chosen."""
    rates = sorted({rate for row in rows.values() for rate in row.validation})

    def cell(row: Row, rate: float) -> Cell:
        found = row.validation.get(rate, math.nan)
        return "diverged" if found is None else "" if math.isnan(found) else found

    return Table(
        "Accuracy on the validation images in percent at each learning rate, first seed",
        ["row", *(f"{rate:.2g}" for rate in rates)],
        {name: [cell(row, rate) for rate in rates] for name, row in rows.items()},
    )


def verdict(ahead: Sequence[float], behind: Sequence[float]) -> str:
    """ "+1.3 points, standard error 0.2: ahead" and the like, of accuracies in percent."""
    mean, error = paired_difference(ahead, behind)
    return f"{mean:+.1f} points, standard error {error:.1f}: {told_apart(mean, error)}"


def at_the_edge(rows: Mapping[str, Row]) -> list[str]:
    """A sentence on rows whose learning rate is the least or greatest of those that did not diverge beyond it."""
    lines = []
    for name, row in rows.items():
        finite = [rate for rate, found in row.validation.items() if found is not None]
        least, greatest = min(row.validation), max(row.validation)
        if finite and (row.rate == least or row.rate == greatest):
            lines.append(f"The learning rate of {name}, {row.rate:g}, is at the edge of the grid.")
    return lines
