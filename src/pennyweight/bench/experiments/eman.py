"""EMAN against ordinary batch norm in the teacher and averaged weights alone: FixMatch with few labels.

    python -m pennyweight.bench.experiments.eman        (about three minutes on one core)

The training is that of recipes/eman.yaml: a student learns from a hundred labelled images of small Fashion-MNIST and,
on distorted copies of unlabelled ones, from what a teacher says of them, where it is sure. The teacher averages the
student's weights (layers/eman.py); rows differ in where its batch norms take their statistics from. Unlabelled batches
are drawn from all classes, or each from three classes at random, as in streams where neighbours resemble each other:
there a teacher that normalises by its batch sees other statistics than its student.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...layers.eman import Buffers
from ...training.data import load_data
from ...training.fixmatch import FixMatch
from ...training.settings import TrainingRecipe
from ..results import Table, write_results
from .command_line import REPOSITORY, arguments_of
from .supervised import fashion_mnist_halved, verdict
from .tuned_training import cached, changed, run, score

COMMAND = "python -m pennyweight.bench.experiments.eman"
RECIPE = REPOSITORY / "recipes" / "eman.yaml"
UNLABELLED, VALIDATION = 20_000, 2_000
RATIO, THRESHOLD, WEIGHT, MOMENTUM = 4, 0.8, 1.0, 0.98
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WIDTH, SKEWED_CLASSES = 128, 3
ALONE, OWN, COPIED, EMAN = "labels alone", "own batch", "student's statistics", "EMAN"
#: Row -> options of the model.
ROWS: dict[str, dict[str, Any]] = {
    ALONE: {"ratio": 0},
    OWN: {"buffers": "own", "mode": "train"},
    COPIED: {"buffers": "copy"},
    EMAN: {"buffers": "ema"},
}
#: Unlabelled batches -> options of the model.
REGIMES: dict[str, dict[str, Any]] = {"all classes": {}, "three classes a batch": {"skewed": True}}


def few_labels(labels: int = 100, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Images [n, 196] and classes: as many labels of each class, at random; validation: the training split's last."""
    parts = _images()
    x, y = parts["train"]
    order = torch.randperm(UNLABELLED, generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[y[order] == each][: labels // 10] for each in range(10)])
    return {
        "train": (x[chosen], y[chosen]),
        "validation": (x[UNLABELLED:], y[UNLABELLED:]),
        "test": parts["test"],
    }


@cache
def _images() -> dict[str, tuple[Tensor, Tensor]]:
    splits = fashion_mnist_halved(UNLABELLED + VALIDATION)
    whole = {part: split.batch(torch.arange(len(split))) for part, split in splits.items()}
    return {part: (images.flatten(1), classes) for part, (images, classes) in whole.items()}


def fixmatch(
    buffers: Buffers = "ema", mode: Literal["eval", "train"] = "eval", ratio: int = RATIO, skewed: bool = False
) -> FixMatch:
    """[samples, 196] -> logits of 10 classes. skewed: unlabelled batches are of three classes at random."""
    images, classes = (tensor[:UNLABELLED] for tensor in _images()["train"])
    return FixMatch(
        student(),
        images,
        weak=weak,
        strong=strong,
        ratio=ratio,
        threshold=THRESHOLD,
        weight=WEIGHT,
        rows=(lambda count: skewed_rows(classes, count)) if skewed else None,
        momentum=MOMENTUM,
        buffers=buffers,
        mode=mode,
    )


def student() -> nn.Sequential:
    """[samples, 196] -> logits of 10 classes."""
    return nn.Sequential(
        nn.Linear(196, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )  # fmt: skip


def weak(x: Tensor) -> Tensor:
    """A little noise."""
    return x + 0.1 * torch.randn_like(x)


def strong(x: Tensor) -> Tensor:
    """Much noise, and a square of 5 x 5 pixels wiped out."""
    corner = torch.randint(14 - 4, (2, len(x), 1))
    inside = [(torch.arange(14) >= c) & (torch.arange(14) < c + 5) for c in corner]
    hole = (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1)
    return (x + 0.5 * torch.randn_like(x)).masked_fill(hole, 0.0)


def skewed_rows(classes: Tensor, count: int) -> Tensor:
    """Of samples of a few classes."""
    present = torch.isin(classes, torch.randperm(10)[:SKEWED_CLASSES]).nonzero()[:, 0]
    return present[torch.randint(len(present), (count,))]


def measured(recipe: TrainingRecipe) -> dict[str, float | None]:
    """Accuracies in percent: of the student, of the teacher, and of the teacher's classes over the last half of the
    steps (`pseudo`), all of them, sure or not."""
    right: list[float] = []
    classes = _images()["train"][1]

    def watch(step: int, model: nn.Module, *_: Any) -> None:
        rows, guessed = cast(FixMatch, model).guesses
        if len(rows) and step >= (recipe.steps or 0) // 2:
            right.append(100 * float((guessed == classes[rows]).double().mean()))

    trained = run(recipe, watch)
    test = load_data(recipe.data, recipe.seed).test
    assert test is not None
    teacher = score(cast(FixMatch, trained.model).teacher, test, recipe)["accuracy"]
    return {
        "validation": trained.validation["accuracy"],
        "student": trained.test["accuracy"],
        "teacher": teacher if right else None,
        "pseudo": fmean(right) if right else None,
    }


def arm(base: TrainingRecipe, row: str, regime: str, rate: float, seed: int) -> TrainingRecipe:
    """The recipe with another teacher, other unlabelled batches, learning rate and seed, which also chooses labels."""
    options = {**ROWS[row], **REGIMES[regime]}
    return changed(
        base, {"model.options": options, "data.options.seed": seed, "optimizer.lr": rate, "seed": seed, "output": ""}
    )


Runs = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def conclusions(found: Runs) -> list[str]:
    """What the numbers say of the claim: parity on batches of all classes, EMAN ahead on skewed ones."""

    def of(row: str, regime: str, key: str) -> list[float]:
        return [run[key] for run in found[row, regime]]

    lines = []
    for regime in REGIMES:
        for other in (OWN, COPIED, ALONE):
            text = verdict(of(EMAN, regime, "student"), of(other, regime, "student"))
            lines.append(f"{regime.capitalize()}, student, EMAN against {other}: {text}.")
        text = verdict(of(EMAN, regime, "pseudo"), of(OWN, regime, "pseudo"))
        lines.append(f"{regime.capitalize()}, the teacher's classes in training, EMAN against {OWN}: {text}.")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "eman.md", __doc__, arguments, seeds=5)
    recipe = TrainingRecipe.load(RECIPE)
    measure = cached(measured, options.runs / "eman")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    grid: dict[tuple[str, str], dict[float, float]] = {}

    def one(row: str, regime: str, rate: float, seed: int) -> dict[str, Any]:
        made = measure(arm(recipe, row, regime, rate, seed))
        print(row, regime, rate, seed, made, file=sys.stderr, flush=True)
        return made

    for regime in REGIMES:
        for row in ROWS:
            tried = {rate: one(row, regime, rate, options.seeds[0]) for rate in RATES}
            grid[row, regime] = {rate: run["validation"] for rate, run in tried.items()}
            best = max(tried, key=lambda rate: tried[rate]["validation"])
            found[row, regime] = [tried[best], *(one(row, regime, best, seed) for seed in options.seeds[1:])]
    cells: dict[str, list[Any]] = {
        f"{row}, {regime}": [
            f"{max(grid[row, regime], key=lambda rate: grid[row, regime][rate]):g}",
            *(
                [run[key] for run in runs] if runs[0][key] is not None else ""
                for key in ("student", "teacher", "pseudo")
            ),
        ]
        for (row, regime), runs in found.items()
    }
    edges = [
        f"The learning rate of {row}, {regime}, is at the edge of the grid."
        for (row, regime), tried in grid.items()
        if max(tried, key=lambda rate: tried[rate]) in (RATES[0], RATES[-1])
    ]
    write_results(
        options.out,
        title="EMAN: a teacher with averaged statistics (arXiv 2101.08482)",
        claim="a teacher whose batch norm statistics are averages of the student's, as its weights are, labels better "
        "than one that normalises by its own batch: about seven points with 1 percent of ImageNet's labels.",
        tables=[
            Table(
                "Accuracy in percent: student and teacher on the test images; the teacher's classes of unlabelled "
                "images over the last half of training",
                ["teacher's statistics, unlabelled batches", "learning rate", "student", "teacher", "its classes"],
                cells,
            ),
            Table(
                "Student's accuracy on the validation images in percent at each learning rate, first seed",
                ["teacher's statistics, unlabelled batches", *(f"{rate:g}" for rate in RATES)],
                {f"{row}, {regime}": list(tried.values()) for (row, regime), tried in grid.items()},
            ),
        ],
        command=COMMAND,
        seeds=options.seeds,
        data=f"Fashion-MNIST at 14 x 14 pixels: {recipe.data.options['labels']} labelled images, {UNLABELLED:,} "
        f"unlabelled ones, {VALIDATION:,} others for the learning rate, all test images. Two hidden layers of {WIDTH} "
        f"with batch norms; {recipe.steps} steps of {recipe.batch} labelled images and {RATIO} times as many "
        f"unlabelled, SGD with momentum, cosine; teacher's momentum {MOMENTUM:g}, threshold {THRESHOLD:g}, weight "
        f"{WEIGHT:g}.",
        conclusion_lines=[*conclusions(found), *edges],
    )
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
