"""What the experiments on weights under control share: recipes trained without ceremony, and settings found by walking.

`run` trains what a recipe of `recipes/` describes, weight for weight as `pennyweight train` does, but without logs,
checkpoints and processes, which cost more than the small networks here; in exchange one can look in at every step. A
run's numbers are kept below --runs under a digest of its recipe: an interrupted experiment goes on where it stopped
(delete them after a change of code).

`walk` finds the settings of an arm by validation: from the best of a few starts spread over its ladders it moves to the
better neighbour along one ladder after the other until no neighbour is better, so that the best is inside. Without the
starts it would stay at the nearest of several hills, such as that of a small decay at a small learning rate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...compress.data import output_tensor
from ...compress.observe import evaluating
from ...errors import require
from ...training.building import make_model, make_optimizer
from ...training.data import Split, load_data
from ...training.evaluation import task_loss
from ...training.hooks import attach, hooks_of
from ...training.learning_rate import learning_rate_factor
from ...training.penalties import Penalties
from ...training.prepare import prepare
from ...training.randomness import derived_seed, generator
from ...training.schedule import Schedule
from ...training.settings import TrainingRecipe
from ..results import paired_difference, told_apart
from .kept import kept

_NEEDED = ("model", "data", "batch")
_CALIBRATION, _EVALUATION_BATCH = 256, 512


Watch = Callable[[int, nn.Module, Tensor, Tensor | None, Tensor], None]


@dataclass(frozen=True)
class Trained:
    """model: in eval mode. validation, test: mean loss, and for classes the accuracy in percent."""

    model: nn.Module
    validation: dict[str, float]
    test: dict[str, float]


def run(recipe: TrainingRecipe, watch: Watch | None = None) -> Trained:
    """Train as the recipe says. watch(step, model, inputs, output, loss): called at every step when the gradients are
    there, before the update; the output is None of a model that has a `training_loss`."""
    data = load_data(recipe.data, recipe.seed)
    per_epoch = len(data.train) // recipe.batch
    lengths = [
        s.steps if s.steps is not None else max(1, round((s.epochs or 0) * per_epoch)) for s in recipe.all_stages
    ]
    torch.manual_seed(derived_seed(recipe.seed, "model"))
    model = make_model(recipe.model)
    order = _order(recipe.seed, 0, len(data.train))
    if recipe.prepare is not None:
        prepare(model, recipe.prepare, data=[data.train.batch(order[:_CALIBRATION])[0]])
    penalties = Penalties(recipe.penalties)
    schedule = Schedule(model, sum(lengths), (recipe.anneal[0], recipe.anneal[1]), recipe.freeze)
    step = 0
    for stage, length in zip(recipe.all_stages, lengths):
        optimizer = make_optimizer(recipe.optimizer_of(stage), model)
        attach(optimizer, hooks_of(model))
        rates, shape = [group["lr"] for group in optimizer.param_groups], recipe.schedule_of(stage)
        model.train()
        for at in range(length):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                order = _order(recipe.seed, epoch, len(data.train))
            rows = order[place * recipe.batch : (place + 1) * recipe.batch]
            inputs, targets = data.train.batch(
                rows, data.train.augmentation(len(rows), generator(recipe.seed, "augment", step))
            )
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * learning_rate_factor(at, length, shape)
            # What torch.manual_seed does on the CPU, without its queue of seeds for devices that are not there.
            torch.default_generator.manual_seed(derived_seed(recipe.seed, "forward", step, 0))
            output, loss = _loss(model, inputs, targets, recipe)
            sum(penalties(model, step / sum(lengths)).values(), start=loss).backward()
            if recipe.clip is not None:
                trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                nn.utils.clip_grad_norm_(trained, recipe.clip)
            if watch is not None:
                watch(step, model, inputs, output, loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
    model.eval()
    assert data.validation is not None and data.test is not None
    return Trained(model, score(model, data.validation, recipe), score(model, data.test, recipe))


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor, recipe: TrainingRecipe) -> tuple[Tensor | None, Tensor]:
    """The model's output without its graph, None where it has a training loss of its own; the loss."""
    if hasattr(model, "training_loss"):
        return None, cast(Any, model).training_loss(inputs, targets)
    output = output_tensor(model(inputs)).float()
    return output.detach(), task_loss(output, targets, recipe.loss)


def _order(seed: int, epoch: int, samples: int) -> Tensor:
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


@torch.no_grad()
def score(model: nn.Module, split: Split, recipe: TrainingRecipe) -> dict[str, float]:
    """Mean loss on a split, and for classes the accuracy in percent."""
    loss = right = answers = 0.0
    classes = recipe.loss.name == "cross-entropy"
    with evaluating(model):
        for rows in torch.arange(len(split)).split(_EVALUATION_BATCH):
            inputs, targets = split.batch(rows)
            output = output_tensor(model(inputs)).float()
            loss += float(task_loss(output, targets, recipe.loss)) * len(rows)
            if classes:
                right, answers = right + float((output.argmax(-1) == targets).sum()), answers + targets.numel()
    return {"loss": loss / len(split)} | ({"accuracy": 100 * right / answers} if classes else {})


def changed(recipe: TrainingRecipe, changes: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe with other values: "optimizer.lr" names one inside."""
    values = recipe.to_dict()
    for name, value in changes.items():
        *path, last = name.split(".")
        place = values
        for key in path:
            place = place[key]
        place[last] = value
    return TrainingRecipe.from_dict(values)


@dataclass(frozen=True)
class Arm:
    """One way to train. recipe: of settings, one value a ladder, and a seed. starts: values of each ladder; the walk
    begins at the best of all their combinations."""

    name: str
    recipe: Callable[[Mapping[str, float], int], TrainingRecipe]
    ladders: Mapping[str, Sequence[float]]
    starts: Mapping[str, Sequence[float]]


Measure = Callable[[TrainingRecipe], dict[str, Any]]


def cached(measure: Measure, folder: Path) -> Measure:
    """`measure` with its results in files, named by what of the recipe is not default."""

    def looked_up(recipe: TrainingRecipe) -> dict[str, Any]:
        plain = TrainingRecipe(recipe.model, recipe.data, recipe.batch, steps=1).to_dict() | {"steps": None}
        said = {key: value for key, value in recipe.to_dict().items() if value != plain[key] or key in _NEEDED}
        return kept(folder, said, lambda: measure(recipe))

    return looked_up


@dataclass(frozen=True)
class Found:
    """settings: the best. tried: settings in the order of the ladders -> validation score. runs: one a seed."""

    settings: dict[str, float]
    tried: dict[tuple[float, ...], float]
    runs: list[dict[str, Any]]

    def values(self, *keys: str) -> list[float]:
        """A number of every run, by its keys."""
        found: list[Any] = list(self.runs)
        for key in keys:
            found = [value[key] for value in found]
        return found


def walk(arm: Arm, measure: Measure, score: Callable[[dict[str, Any]], float], seeds: Sequence[int]) -> Found:
    """The settings with the best validation score of the first seed, and runs of all seeds with them.

    score(run): the greater the better.
    """
    names = list(arm.ladders)
    tried: dict[tuple[int, ...], float] = {}

    def settings(place: tuple[int, ...]) -> dict[str, float]:
        return {name: arm.ladders[name][index] for name, index in zip(names, place)}

    def value(place: tuple[int, ...]) -> float:
        if place not in tried:
            reached = score(measure(arm.recipe(settings(place), seeds[0])))
            tried[place] = reached if math.isfinite(reached) else -math.inf  # it has diverged
            told = ", ".join(f"{name} {value:g}" for name, value in settings(place).items())
            print(f"{arm.name}: {told}: {tried[place]:.4g}", file=sys.stderr, flush=True)
        return tried[place]

    best = max(product(*([arm.ladders[name].index(start) for start in arm.starts[name]] for name in names)), key=value)
    unmoved = 0
    while unmoved < len(names):
        for axis, name in enumerate(names):
            around = [
                (*best[:axis], best[axis] + way, *best[axis + 1 :])
                for way in (-1, 1)
                if 0 <= best[axis] + way < len(arm.ladders[name])
            ]
            better = max([best, *around], key=value)
            unmoved = unmoved + 1 if better == best else 0
            best = better
            if unmoved == len(names):
                break
    runs = [measure(arm.recipe(settings(best), seed)) for seed in seeds]
    named = {tuple(settings(place).values()): score for place, score in tried.items()}
    return Found(settings(best), named, runs)


def at_an_end(arm: Arm, found: Found) -> list[str]:
    """A sentence for each setting at an end of its ladder that is not 0, the natural one."""
    return [
        f"{arm.name}: {name} {value:g} is at the end of its ladder; a better one may lie beyond."
        for name, value in found.settings.items()
        if value in (arm.ladders[name][0], arm.ladders[name][-1]) and value != 0
    ]


def shown(settings: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def verdict(values: Sequence[float], reference: Sequence[float], unit: str = "points") -> str:
    """ "+0.8 points, standard error 0.1 over 5 seeds: better" and the like; greater values are better."""
    mean, error = paired_difference(values, reference)
    word = told_apart(mean, error, "better", "worse")
    return f"{mean:+.2g} {unit}, standard error {error:.1g} over {len(values)} seeds: {word}"


def drawing(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns], of the same bytes at every run. size: in inches."""
    matplotlib = require("matplotlib", "dev")
    matplotlib.use("svg")
    pyplot = require("matplotlib.pyplot", "dev")
    options = {"font.size": 9, "svg.hashsalt": "pennyweight", "svg.fonttype": "none", "font.family": "sans-serif"}
    pyplot.rcParams.update(options)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
