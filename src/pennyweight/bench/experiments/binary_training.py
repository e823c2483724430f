"""What the experiments on binary training share: network, images, baselines, runs kept on disk, the page.

A recipe file of `recipes/` says how a method trains a ResNet-20, which at a length that tells methods apart takes hours
on a CPU. An experiment trains by the same recipe a plain network of six convolutions, all but the first binary, and at
the same number of steps what the method is compared with: optimizer, schedule, stages and `prepare` are the recipe's,
model, data, batch and steps are those of `SETTING`.

All rows start from the same learning rates, and as long as the best of a row lies at the edge of those it has tried, it
tries the next (rates.py). The best is the one of the highest accuracy on validation images taken out of the training
split, with the first seed; the test images have no part in it.

Two experiments share the baselines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ...training.settings import DataSettings, ModelSettings, TrainingRecipe
from ..results import Cell, Table, paired_difference, told_apart, write_results
from . import recipe_runs
from .command_line import REPOSITORY, arguments_of
from .rates import at_the_edge, best_rate, tried_rates
from .recipe_runs import Contender, trained

#: Learning rates that every row tries, and those that it may come to.
RATES = (3e-3, 1e-2)
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
STEPS = 1500
#: Of a recipe, what an experiment replaces.
SETTING: dict[str, Any] = {
    "model": ModelSettings("vgg_small", {"width": 16, "image_size": 16}),
    "data": DataSettings(f"{recipe_runs.__name__}:cifar10_halved", {"samples": 22_000}, validation=2_000, flip=True),
    "batch": 64,
    "log_every": 500,
    "checkpoint_every": STEPS,
}
#: The first rows of every experiment: name -> preset, or None for full precision.
BASELINES: dict[str, str | None] = {"full precision": None, "STE": "bnn", "Bi-Real": "bi-real"}


def contenders(
    path: Path, method: str, variants: Mapping[str, Callable[[TrainingRecipe], TrainingRecipe]]
) -> list[Contender]:
    """Baselines, the method of a recipe file, and variants of it: name -> what it makes of the method's recipe.

    Baselines differ from the recipe in `prepare` alone, but that they have no stages: all steps are of one.
    """
    own = _in_setting(TrainingRecipe.load(path))
    made = []
    for name, preset in BASELINES.items():
        prepare = None if preset is None else {"preset": preset}
        made.append(Contender(name, dataclasses.replace(in_one_stage(own), prepare=prepare)))
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
    own = outcomes[method].accuracy
    mean, error = paired_difference(own, outcomes[baseline].accuracy)
    return (
        f"{method} against {baseline}: {mean:+.1f} points, standard error {error:.1f} over {len(own)} seeds: "
        f"{told_apart(mean, error)}."
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
        f"CIFAR-10 at 16 x 16 pixels, the first {samples:,} training images ({held_out:,} of them for validation, "
        "drawn anew for each seed), all 10,000 test images; mirrored at random. VGG-small of width "
        f"{recipe.model.options['width']}, its first convolution and its classifier real; {STEPS:,} steps of "
        f"{recipe.batch} images ({STEPS * recipe.batch / (samples - held_out):.1f} epochs), {recipe.optimizer.name}, "
        f"{recipe.schedule.name} schedule."
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
    options = arguments_of(command, f"{name}.md", doc, arguments)
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
