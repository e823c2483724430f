"""LAWN-Adam and LAWN-SGD beside Adam and SGD with tuned weight decay, at small and large batches.

    python -m pennyweight.bench.experiments.lawn        (about twenty minutes on one core; goes on where it stopped)

1. Images: Fashion-MNIST at 14 x 14 pixels, an MLP whose first layer is batch-normalised, so that its last two layers
   are the final homogeneous sub-network.
2. Ratings made on the spot: a user likes an item by a latent-factor model with noise, in five classes of one size; two
   tables of embeddings and an MLP, all of whose layers are the sub-network.

Every arm trains for as many epochs at either batch size, so that large batches take few steps. LAWN is trained as
recipes/lawn.yaml has it; the others leave out the second stage. Its second setting is the length of the free phase
where theirs is weight decay. On ratings, whose tables are outside the sub-network, there is also LAWN with decay of
what it does not constrain, and no SGD, which hardly moves tables. Settings: see tuned_training.py. Data:
PENNYWEIGHT_DATA, default ../shared/data beside the repository.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compress.observe import evaluating
from ...optim import final_homogeneous
from ...training.data import Split, load_data
from ...training.settings import DataSettings, TrainingRecipe
from ..results import Table, write_results
from .command_line import REPOSITORY, arguments_of
from .tuned_training import (
    Arm,
    Found,
    Measure,
    at_an_end,
    cached,
    changed,
    drawing,
    run,
    save_figure,
    shown,
    verdict,
    walk,
)

COMMAND = "python -m pennyweight.bench.experiments.lawn"
RECIPE = REPOSITORY / "recipes" / "lawn.yaml"
TRAIN, VALIDATION, TEST = 8192, 4096, 5000
USERS, ITEMS, FACTORS, CLASSES, NOISE = 400, 200, 4, 5, 0.5
EPOCHS = 20
#: Points of a curve, and looks that each of them is the mean of, where a run has as many steps.
POINTS, LOOKS = 60, 4
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
ADAM_DECAYS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SGD_DECAYS = (0.0, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
#: Of a curve.
COLUMNS = ("step", "loss", "logits", "gradient", "weights")
FREE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
#: Task -> changes of the recipe, and its batch sizes.
TASKS: dict[str, tuple[dict[str, Any], Sequence[int]]] = {
    "images": ({}, (128, 2048)),
    "ratings": (
        {
            "model.name": f"{__package__}.lawn:recommender",
            "data.name": f"{__package__}.lawn:ratings",
        },
        (128, 2048),
    ),
}


@cache
def small_images() -> dict[str, Split]:
    """Fashion-MNIST at 14 x 14: the mean of each 2 x 2 pixels, rounded."""
    data = load_data(DataSettings("fashion-mnist", samples=TRAIN + VALIDATION), seed=0)
    assert data.test is not None
    return {"train": _halved(data.train), "test": _halved(data.test.rows(torch.arange(TEST)))}


def _halved(split: Split) -> Split:
    return dataclasses.replace(split, inputs=F.avg_pool2d(split.inputs.float(), 2).round().byte())


def image_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(196, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@cache
def ratings() -> dict[str, tuple[Tensor, Tensor]]:
    """(user, item) int64 [n, 2] and the class of the rating, which is drawn from the model below with noise."""
    draw = torch.Generator().manual_seed(0)
    users, items = torch.randn(USERS, FACTORS, generator=draw), torch.randn(ITEMS, FACTORS, generator=draw)
    count = TRAIN + VALIDATION + TEST
    pairs = torch.randperm(USERS * ITEMS, generator=draw)[:count]
    pairs = torch.stack([pairs // ITEMS, pairs % ITEMS], 1)
    scores = (users[pairs[:, 0]] * items[pairs[:, 1]]).sum(1) / FACTORS**0.5 + items[pairs[:, 1], 0]
    scores += NOISE * torch.randn(count, generator=draw)
    edges = scores.quantile(torch.arange(1, CLASSES) / CLASSES)
    classes = torch.bucketize(scores, edges)
    return {"train": (pairs[:-TEST], classes[:-TEST]), "test": (pairs[-TEST:], classes[-TEST:])}


class Recommender(nn.Module):
    """(user, item) int64 [batch, 2] -> logits of the rating [batch, classes]."""

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, features), nn.Embedding(ITEMS, features)
        self.layers = nn.Sequential(
            nn.Linear(2 * features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)
        )

    def forward(self, pairs: Tensor) -> Tensor:
        return self.layers(torch.cat([self.users(pairs[:, 0]), self.items(pairs[:, 1])], 1))


def recommender() -> Recommender:
    return Recommender()


def measured(recipe: TrainingRecipe) -> dict[str, Any]:
    """A run's validation and test scores, its curves, each point the mean over a stretch of steps (`COLUMNS`), and the
    means over the last tenth of the steps."""
    names: list[str] = []
    rows: list[list[float]] = []
    every = max(1, EPOCHS * (TRAIN // recipe.batch) // (POINTS * LOOKS))

    def watch(step: int, model: nn.Module, inputs: Tensor, logits: Tensor | None, loss: Tensor) -> None:
        assert logits is not None
        if step % every:
            return
        if not names:
            with evaluating(model):
                names.extend(final_homogeneous(model, inputs[:2]))
        weights = dict(model.named_parameters())
        gradient = torch.cat([cast(Tensor, weights[name].grad).flatten() for name in names]).norm()
        inside = torch.cat([weights[name].detach().flatten() for name in names]).norm()
        rows.append([float(step), float(loss), float(logits.abs().mean()), float(gradient), float(inside)])

    trained = run(recipe, watch=watch)
    size = -(-len(rows) // POINTS)
    curve = [[fmean(column) for column in zip(*rows[at : at + size])] for at in range(0, len(rows), size)]
    last = [fmean(column) for column in zip(*rows[-max(1, len(rows) // 10) :])]
    return {
        "validation": trained.validation,
        "test": trained.test,
        "curve": curve,
        "last": dict(zip(COLUMNS, last)),
    }


def arms(base: TrainingRecipe, tables: bool) -> list[Arm]:
    """Of one task and batch. tables: the model has embeddings, which LAWN leaves alone: so it also comes with decay of
    them, and SGD, which hardly moves them, is left out."""
    single = dataclasses.replace(base, stages=(), epochs=float(EPOCHS), schedule=base.schedule_of(base.stages[1]))

    def plain(name: str, **options: Any) -> Any:
        return lambda settings, seed: changed(
            single,
            {
                "seed": seed,
                "optimizer.name": name,
                "optimizer.lr": settings["lr"],
                "optimizer.weight_decay": settings.get("decay", 0.0),
                "optimizer.options": {"fused": True, **options},
            },
        )

    def lawn(name: str, **options: Any) -> Any:
        def recipe(settings: Mapping[str, float], seed: int) -> TrainingRecipe:
            free, constrained = (dataclasses.asdict(stage) for stage in base.stages)
            return changed(
                plain(name, **options)(settings, seed),
                {
                    "epochs": None,
                    "stages": [
                        {**free, "epochs": settings["free epochs"]},
                        {**constrained, "epochs": EPOCHS - settings["free epochs"]},
                    ],
                },
            )

        return recipe

    momentum = {"momentum": 0.9}
    starts: dict[str, Sequence[float]] = {"lr": (3e-3, 3e-2), "decay": (0.03, 0.3, 3.0), "free epochs": (0.5, 2.0, 8.0)}
    adam: dict[str, Sequence[float]] = {"lr": RATES, "decay": ADAM_DECAYS}
    found = [
        Arm("Adam", plain("adamw"), {"lr": RATES}, starts),
        Arm("AdamW", plain("adamw"), adam, starts),
        Arm("LAWN-Adam", lawn("adamw"), {"lr": RATES, "free epochs": FREE}, starts),
    ]
    if tables:
        both = {**starts, "free epochs": (2.0,)}
        return [*found, Arm("LAWN-AdamW", lawn("adamw"), {**adam, "free epochs": FREE}, both)]
    starts = {**starts, "lr": (1e-1, 3e-1), "decay": (3e-4, 3e-3, 3e-2)}
    return [
        *found,
        Arm("SGD", plain("sgd", **momentum), {"lr": RATES}, starts),
        Arm("SGD + decay", plain("sgd", **momentum), {"lr": RATES, "decay": SGD_DECAYS}, starts),
        Arm("LAWN-SGD", lawn("sgd", **momentum), {"lr": RATES, "free epochs": FREE}, starts),
    ]


Results = Mapping[tuple[str, int], Mapping[str, Found]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "lawn.md", __doc__, arguments, seeds=3)
    recipe = TrainingRecipe.load(RECIPE)
    measure = cached(measured, options.runs / "lawn")
    found: dict[tuple[str, int], dict[str, Found]] = {}
    ends: list[str] = []
    equal: list[str] = []
    for task, (changes, batches) in TASKS.items():
        for batch in batches:
            base = changed(recipe, {**changes, "batch": batch, "output": ""})
            every = arms(base, tables=task == "ratings")
            best = {
                arm.name: walk(arm, measure, lambda one: one["validation"]["accuracy"], options.seeds) for arm in every
            }
            ends += [f"{task}, batch {batch}: {line}" for arm in every for line in at_an_end(arm, best[arm.name])]
            equal += [
                f"{task}, batch {batch}: {line}" for line in at_equal_rates(every, best, measure, options.seeds[0])
            ]
            found[task, batch] = best
    draw(found, options.out.with_suffix(".svg"))
    write_results(
        options.out,
        title="LAWN: constant weight norms beside tuned weight decay (arXiv 2108.05839)",
        claim="without well-tuned decay logits and weights grow, the gradient dwindles and the network cannot move any "
        "more; norms held constant after a free phase keep it adaptive, generalise better, most of all with Adam, and "
        "lose less at large batches, for images and recommenders.",
        tables=[*accuracies(found), final_state(found)],
        command=COMMAND,
        seeds=options.seeds,
        data=f"Images: Fashion-MNIST at 14 x 14, {TRAIN:,} training images, {VALIDATION:,} others to choose settings "
        f"by accuracy (first seed), the first {TEST:,} test images. Ratings: {USERS} users, {ITEMS} items, {FACTORS} "
        f"factors, noise of standard deviation {NOISE}, {CLASSES} classes, as many pairs in each part. {EPOCHS} epochs "
        f"at every batch size. Ladders: learning rate {_told(RATES)}; decay {_told(ADAM_DECAYS)} for Adam, "
        f"{_told(SGD_DECAYS)} for SGD with momentum 0.9; free phase {_told(FREE)} epochs. LAWN-AdamW, whose decay acts "
        "on what LAWN leaves free, walks all three, the other arms two at most.",
        figures={
            "lawn.svg": "The mean of |logits| and the norms of the gradient and the weights of the final homogeneous "
            "sub-network over training; each arm with its chosen settings, first seed."
        },
        conclusion_lines=[*conclusions(found), *equal, *ends],
    )
    print(options.out.read_text(encoding="utf-8"))


def _told(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def accuracies(found: Results) -> list[Table]:
    """One table a task."""
    tables = []
    for task, (_, batches) in TASKS.items():
        rows = {
            arm: [cell for batch in batches for cell in _accuracy_cells(found[task, batch][arm])]
            for arm in found[task, batches[0]]
        }
        columns = [f"{what}, batch {batch}" for batch in batches for what in ("settings", "accuracy", "loss")]
        tables.append(Table(f"{task.capitalize()}: test accuracy in percent, test loss", ["arm", *columns], rows, 2))
    return tables


def _accuracy_cells(best: Found) -> list[Any]:
    return [shown(best.settings), best.values("test", "accuracy"), best.values("test", "loss")]


def final_state(found: Results) -> Table:
    rows: dict[str, list[Any]] = {
        f"{task}, {batch}: {arm}": [one.values("last", column) for column in COLUMNS[1:]]
        for (task, batch), best in found.items()
        for arm, one in best.items()
    }
    return Table(
        "Over the last tenth of the steps: loss, mean of |logits|, norms of the sub-network's gradient and weights",
        ["task, batch: arm", "training loss", "logits", "gradient", "weights"],
        rows,
        2,
    )


def conclusions(found: Results) -> list[str]:
    """What the numbers say of the claim."""
    lines = []
    pairs = (("LAWN-Adam", "Adam"), ("LAWN-Adam", "AdamW"), ("LAWN-SGD", "SGD"), ("LAWN-SGD", "SGD + decay"))
    pairs = (*pairs, ("LAWN-AdamW", "AdamW"))
    for (task, batch), best in found.items():
        for method, baseline in pairs:
            if method not in best:
                continue
            told = verdict(best[method].values("test", "accuracy"), best[baseline].values("test", "accuracy"))
            lines.append(f"{task}, batch {batch}: {method} against {baseline}, test accuracy: {told}.")
    level = [
        verdict(best["LAWN-Adam"].values("test", "accuracy"), best["AdamW"].values("test", "accuracy"))
        for best in found.values()
    ]
    lines.append(
        "Without any weight decay LAWN-Adam is as good as AdamW with tuned decay, or better, in "
        f"{sum(not told.endswith('worse') for told in level)} of {len(level)} settings."
    )
    for task, (_, batches) in TASKS.items():
        for method, baseline in (("LAWN-Adam", "AdamW"), ("LAWN-SGD", "SGD + decay")):
            if method not in found[task, batches[0]]:
                continue
            lost = {
                arm: fmean(found[task, batches[0]][arm].values("test", "accuracy"))
                - fmean(found[task, batches[-1]][arm].values("test", "accuracy"))
                for arm in (method, baseline)
            }
            less = "less" if lost[method] < lost[baseline] else "not less"
            lines.append(
                f"{task}: from batch {batches[0]} to {batches[-1]} {method} loses {lost[method]:.1f} points and "
                f"{baseline} {lost[baseline]:.1f}: {less}, {'as' if less == 'less' else 'not as'} the paper has it."
            )
    for (task, batch), best in found.items():
        for method, baseline in (("LAWN-Adam", "Adam"), ("LAWN-SGD", "SGD")):
            if method not in best:
                continue
            ratios = {
                column: fmean(best[method].values("last", column)) / fmean(best[baseline].values("last", column))
                for column in ("logits", "gradient")
            }
            lines.append(
                f"{task}, batch {batch}: at the end {method} has {ratios['logits']:.2f} times the logits of {baseline} "
                f"and {ratios['gradient']:.2f} times its gradient, each at its own learning rate: "
                + ("adaptivity is kept" if ratios["gradient"] > 1 > ratios["logits"] else "no gain of adaptivity")
                + "."
            )
    return lines


def at_equal_rates(every: Sequence[Arm], best: Mapping[str, Found], measure: Measure, seed: int) -> list[str]:
    """How the logits and the gradient at the end compare where LAWN and its optimizer had the same learning rate, LAWN
    with the length of the free phase that does best there on validation; first seed."""
    arms_of = {arm.name: arm for arm in every}
    lines = []
    for method, baseline in (("LAWN-Adam", "Adam"), ("LAWN-SGD", "SGD")):
        if method not in best:
            continue
        told = []
        for (rate,) in sorted(best[baseline].tried):
            tried = {settings: value for settings, value in best[method].tried.items() if settings[0] == rate}
            if not tried:
                continue
            (_, free) = max(tried, key=lambda settings: tried[settings])
            lawn = measure(arms_of[method].recipe({"lr": rate, "free epochs": free}, seed))["last"]
            plain = measure(arms_of[baseline].recipe({"lr": rate}, seed))["last"]
            logits, gradient = lawn["logits"] / plain["logits"], lawn["gradient"] / plain["gradient"]
            told.append(f"{logits:.2f} and {gradient:.2f} at {rate:g}")
        lines.append(f"logits and gradient of {method} over those of {baseline} at equal rates: {'; '.join(told)}.")
    return lines


def draw(found: Results, path: Path) -> None:
    """Curves of the Adam arms, one column a task and batch."""
    labels = {"logits": "mean of |logits|", "gradient": "gradient norm", "weights": "weight norm"}
    figure, axes = drawing(len(labels), len(found), (2.4 * len(found), 5.4))
    styles = {"Adam": ("#888888", "--"), "AdamW": ("#1d4ed8", "-"), "LAWN-Adam": ("#c2410c", "-")}
    for column, ((task, batch), best) in enumerate(found.items()):
        axes[0][column].set_title(f"{task}, batch {batch}")
        axes[-1][column].set_xlabel("step")
        for row, (name, label) in enumerate(labels.items()):
            axes[row][0].set_ylabel(label)
            for arm, (color, line) in styles.items():
                curve = best[arm].runs[0]["curve"][::2]
                values = [point[COLUMNS.index(name)] for point in curve]
                axes[row][column].plot([point[0] for point in curve], values, line, color=color, label=arm)
    axes[0][0].legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
