"""Weight decay for any p norm: sparsity against accuracy, beside AdamW with magnitude pruning and fine-tuning.

    python -m pennyweight.bench.experiments.pwd        (about three hours on one core; goes on where it stopped)

What is learnt, and by which networks, is in pwd_tasks.py; --tasks takes some of them. Every p is trained with every
decay and learning rate of its grid, as recipes/pwd.yaml has it, with the first seed. For each share of exact zeros
(`LEVELS`) the settings with the best validation score that reach it are the ones that all seeds are trained with. AdamW
has a grid of as many settings. Magnitude pruning trains as many steps in all: AdamW with its best decay for 60 % of
them, then the smallest weights of all matrices together, or of each, are cut, and what is left is fine-tuned with a
learning rate that starts anew; it tries both with every learning rate at every share. Data: PENNYWEIGHT_DATA, default
../shared/data beside the repository.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...training.building import make_model
from ...training.settings import ModelSettings, TrainingRecipe
from ..results import Table, mean_and_spread, write_results
from .command_line import REPOSITORY, arguments_of
from .pwd_tasks import TASKS, Task
from .tuned_training import Measure, cached, changed, drawing, run, save_figure, verdict

COMMAND = "python -m pennyweight.bench.experiments.pwd"
RECIPE = REPOSITORY / "recipes" / "pwd.yaml"
#: Tried with p below 1, which needs less, and from 1 on.
DECAYS = {True: (0.01, 0.03, 0.1, 0.3), False: (0.03, 0.1, 0.3, 1.0)}
ADAMW_DECAYS = (0.0, 0.1, 1.0, 3.0)
LEVELS = (0.5, 0.8, 0.9)
#: Of the steps, for training before magnitude pruning.
BEFORE_PRUNING = 0.6
ADAMW, PRUNED = "AdamW", "AdamW, pruned"


class MagnitudePruned(nn.Module):
    """A model whose smallest weights become zero after a step and stay so.

    sparsity: the share that goes, of all matrices together or of each. at: the step. It acts around the optimizer's
    step, as a module of the model.
    """

    def __init__(self, model: nn.Module, sparsity: float, at: int, each: bool) -> None:
        super().__init__()
        self.model, self.sparsity, self.at, self.each, self.steps = model, sparsity, at, each, 0
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def before_step(self) -> None:
        return

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps += 1
        weights = matrices(self)
        if self.steps == self.at:
            sizes = [weight.abs().flatten() for weight in weights]
            ranked = sizes if self.each else [torch.cat(sizes)] * len(sizes)
            thresholds = [size.kthvalue(round(self.sparsity * len(size))).values for size in ranked]
            self.kept = [weight.abs() > threshold for weight, threshold in zip(weights, thresholds)]
        for weight, kept_ones in zip(weights, self.kept):
            weight.mul_(kept_ones)


def magnitude_pruned(
    model: str, sparsity: float, at: int, each: bool, options: Mapping[str, Any] | None = None
) -> MagnitudePruned:
    return MagnitudePruned(make_model(ModelSettings(model, dict(options or {}))), sparsity, at, each)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What decays, and what is pruned."""
    return [parameter for parameter in model.parameters() if parameter.ndim >= 2]


def measured(recipe: TrainingRecipe) -> dict[str, Any]:
    """Validation and test scores, the greater the better (accuracy in percent, or less the bits), and exact zeros."""
    trained = run(recipe)
    weights = matrices(trained.model)
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    bits = recipe.data.name.endswith(":characters")
    scores = {
        part: -found["loss"] / math.log(2) if bits else found["accuracy"]
        for part, found in (("validation", trained.validation), ("test", trained.test))
    }
    return {**scores, "zeros": zeros}


def decayed(base: TrainingRecipe, p: float, decay: float, rate: float, seed: int) -> TrainingRecipe:
    return changed(
        base,
        {"seed": seed, "optimizer.lr": rate, "optimizer.weight_decay": decay, "optimizer.options.p": p},
    )


def adamw(base: TrainingRecipe, decay: float, rate: float, seed: int) -> TrainingRecipe:
    optimizer = {"name": "adamw", "lr": rate, "weight_decay": decay, "options": {"fused": True}}
    return changed(base, {"seed": seed, "optimizer": optimizer})


def pruned(
    base: TrainingRecipe, samples: int, sparsity: float, decay: float, each: bool, rate: float, seed: int
) -> TrainingRecipe:
    """samples: of the training split, without those for validation."""
    steps = round((base.epochs or 0) * (samples // base.batch))
    first = round(BEFORE_PRUNING * steps)
    return changed(
        adamw(base, decay, rate, seed),
        {
            "model": {
                "name": f"{__package__}.pwd:magnitude_pruned",
                "options": {"model": base.model.name, "sparsity": sparsity, "at": first, "each": each},
            },
            "epochs": None,
            "stages": [{"steps": first}, {"steps": steps - first}],
        },
    )


class Point(NamedTuple):
    """settings: what was chosen for a share of zeros; runs: one a seed."""

    settings: tuple[float, ...]
    runs: list[dict[str, float]]

    def values(self, key: str) -> list[float]:
        return [run[key] for run in self.runs]


def compare(task: Task, base: TrainingRecipe, measure: Measure, seeds: Sequence[int]) -> dict[str, dict[float, Point]]:
    """Contender -> share of zeros asked for (0: none) -> point; shares that no setting reaches are left out."""
    found: dict[str, dict[float, Point]] = {}

    def best(recipe: Callable[..., TrainingRecipe], grid: Iterable[tuple[float, ...]], level: float) -> Point | None:
        tried = {settings: measure(recipe(*settings, seeds[0])) for settings in grid}
        enough = [settings for settings, one in tried.items() if one["zeros"] >= level]
        if not enough:
            return None
        chosen = max(enough, key=lambda settings: tried[settings]["validation"])
        return Point(chosen, [measure(recipe(*chosen, seed)) for seed in seeds])

    dense = best(partial(adamw, base), product(ADAMW_DECAYS, task.rates), 0.0)
    assert dense is not None
    found[ADAMW] = {0.0: dense}
    for p in task.exponents:
        points = {
            level: best(partial(decayed, base, p), product(DECAYS[p < 1], task.rates), level)
            for level in (0.0, *LEVELS)
        }
        found[f"p = {p:g}"] = {level: point for level, point in points.items() if point is not None}
    found[PRUNED] = {}
    for level in LEVELS:
        recipe = partial(pruned, base, task.samples, level, dense.settings[0])
        point = best(recipe, product((False, True), task.rates), 0.0)
        assert point is not None
        found[PRUNED][level] = point
    return found


Results = Mapping[str, Mapping[float, Point]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "pwd.md", __doc__, arguments, seeds=3, tasks=list(TASKS))
    recipe = changed(TrainingRecipe.load(RECIPE), {"output": ""})
    measure = cached(measured, options.runs / "pwd")
    found: dict[str, Results] = {}
    described: list[str] = []
    for name in options.tasks:
        task = TASKS[name]
        base = changed(recipe, task.changes)
        found[name] = compare(task, base, measure, options.seeds)
        weights = sum(weight.numel() for weight in matrices(make_model(base.model)))
        described.append(f"{task.data}; {weights:,} weights.")
    draw(found, options.out.with_suffix(".svg"))
    write_results(
        options.out,
        title="pWD: sparsity against quality for weight decay of any p norm (arXiv 2404.10824)",
        claim="decoupled decay of a p norm makes most weights exactly zero for p <= 1 while they train, most of all "
        "for p < 1, with quality close to that of AdamW and comparable to pruning; between 1 and 2 p generalises best.",
        tables=[table for name, results in found.items() for table in tables(name, results)],
        command=options.command,
        seeds=options.seeds,
        data=" ".join(described) + f" Settings are chosen on others of the "
        f"training part, with the first seed. Decays {_told(DECAYS[True])} below p = 1, "
        f"{_told(DECAYS[False])} from there on, {_told(ADAMW_DECAYS)} of AdamW, whose 1 is the 0.5 of p = 2; learning "
        "rates "
        + "; ".join(f"{_told(TASKS[name].rates)} ({name})" for name in found)
        + ". Zeros are counted over all weights with two axes or more, which are those that decay.",
        figures={"pwd.svg": "Quality on test data against the share of weights that are not zero, means over seeds."},
        conclusion_lines=[line for name, results in found.items() for line in conclusions(name, results)],
    )
    print(options.out.read_text(encoding="utf-8"))


def _told(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def tables(name: str, found: Results) -> list[Table]:
    """Quality by share of zeros, and the settings."""
    digits = 2 if name == "characters" else 1
    columns = ["", "no zeros asked", *(f">= {100 * level:g} % zeros" for level in LEVELS)]

    def cells(points: Mapping[float, Point], text: Callable[[Point], str]) -> list[str]:
        return [text(points[level]) if level in points else "" for level in (0.0, *LEVELS)]

    def quality(point: Point) -> str:
        values = [abs(value) for value in point.values("test")]
        return f"{mean_and_spread(values, digits)} ({100 * fmean(point.values('zeros')):.1f} %)"

    return [
        Table(
            f"{name.capitalize()}: {TASKS[name].quality} (share of exact zeros)",
            columns,
            {contender: cells(points, quality) for contender, points in found.items()},
        ),
        Table(
            f"{name.capitalize()}: decay, learning rate ({PRUNED}: whether each matrix is pruned apart, learning rate)",
            columns,
            {c: cells(points, lambda point: _told(point.settings)) for c, points in found.items()},
        ),
    ]


def conclusions(name: str, found: Results) -> list[str]:
    """What the numbers say of the claim."""
    task, unit = TASKS[name], "bits" if name == "characters" else "points"
    decayed_ones = {contender: points for contender, points in found.items() if contender.startswith("p =")}

    def gain(point: Point, reference: Point) -> str:
        return verdict(point.values("test"), reference.values("test"), f"{unit} (positive is better)")

    dense = found[ADAMW][0.0]
    best = max(decayed_ones, key=lambda contender: fmean(decayed_ones[contender][0.0].values("validation")))
    within = 1 <= float(best.removeprefix("p = ")) <= 2
    lines = [
        f"{name}: without asking for zeros the best on validation is {best}, {'within' if within else 'not within'} 1 "
        f"to 2; against AdamW: {gain(decayed_ones[best][0.0], dense)}."
    ]
    for level in LEVELS:
        reaching = {contender: points[level] for contender, points in decayed_ones.items() if level in points}
        if not reaching:
            lines.append(f"{name}: no decay of the grid reaches {100 * level:g} % zeros.")
            continue
        best = max(reaching, key=lambda contender: fmean(reaching[contender].values("validation")))
        lines.append(
            f"{name}, at least {100 * level:g} % zeros: the best decay is {best}; against {PRUNED}: "
            f"{gain(reaching[best], found[PRUNED][level])}."
        )
    sparsest = {}
    for contender, points in found.items():
        close = [
            fmean(point.values("zeros"))
            for point in points.values()
            if fmean(point.values("test")) >= fmean(dense.values("test")) - task.near
        ]
        sparsest[contender] = max(close, default=0.0)
    lines.append(
        f"{name}, most zeros within {task.near:g} {unit} of AdamW: "
        + ", ".join(f"{contender} {100 * share:.0f} %" for contender, share in sparsest.items() if contender != ADAMW)
        + "."
    )
    least = max(decayed_ones, key=lambda contender: sparsest[contender])
    below = float(least.removeprefix("p = ")) < 1
    lines.append(
        f"{name}: of the decays {least} is the sparsest there, {'as' if below else 'not as'} the paper has it (p < 1)."
    )
    smooth = [points for contender, points in decayed_ones.items() if float(contender.removeprefix("p = ")) > 1]
    zeros = max(max(point.values("zeros")) for points in smooth for point in points.values())
    ends = {
        contender: sum(point.settings[-1] == task.rates[-1] for point in points.values())
        for contender, points in found.items()
    }
    lines.append(
        f"{name}: chosen learning rates at the upper end of the grid, beyond which a better one may lie: "
        + ", ".join(f"{contender} {count} of {len(found[contender])}" for contender, count in ends.items())
        + "."
    )
    lines.append(f"{name}: above p = 1 at most {100 * zeros:.1f} % of the chosen runs' weights are exactly zero.")
    return lines


def draw(found: Mapping[str, Results], path: Path) -> None:
    figure, all_axes = drawing(1, len(found), (4.2 * len(found), 3.4))
    names = dict.fromkeys(contender for results in found.values() for contender in results if contender[0] == "p")
    style: dict[str, dict[str, Any]] = {name: {"color": f"C{index}"} for index, name in enumerate(names)}
    style[PRUNED] = {"color": "black", "linewidth": 2}
    for axes, (name, results) in zip(all_axes[0], found.items()):
        for contender, points in results.items():
            ordered = sorted((1 - fmean(p.values("zeros")), abs(fmean(p.values("test")))) for p in points.values())
            if contender == ADAMW:
                axes.axhline(ordered[0][1], color="#888888", linewidth=1, linestyle="--", label=contender)
            else:
                x, y = zip(*ordered)
                axes.plot([100 * share for share in x], y, marker=".", label=contender, **style[contender])
        axes.set_xscale("log")
        axes.set_xlabel("weights that are not zero, %")
        axes.set_title(f"{name}: {TASKS[name].quality}")
        if name == "characters":
            axes.invert_yaxis()
    all_axes[0][0].legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
