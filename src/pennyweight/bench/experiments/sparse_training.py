"""From sparse training to a small file: accuracy against bytes of the finished file, on a small convolutional network.

    python -m pennyweight.bench.experiments.sparse_training        (half an hour on one core; goes on where it stopped)

All networks are trained for the same number of steps on the same Fashion-MNIST images, as recipes/sparse-training.yaml
says but for what is named:

    pWD, p = 0.5, 0.8, 1    decoupled decay for the p norm, each at three strengths
    l1 penalty              strength sum |w| in the loss of AdamW, three strengths; weights below a cut become zero
    pruned                  AdamW for half of the steps, then the least weights of all layers set to zero, three shares,
                            and fine-tuned for the other half under a schedule of its own
    dense                   AdamW with weight decay

Files are of two kinds: zeros as zeros and the others in half precision (`pennyweight.convert`), and what
`pennyweight.shrink` makes at a given size. The learning rate of each comes from one grid for all: the one with the best
validation accuracy of a file within each of `SIZES`, on average, with the first seed. Which strength serves at which
size is chosen on validation images, too; test images are looked at once.

Data: PENNYWEIGHT_DATA, default ../shared/data beside the repository.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import prune

from ...checkpoints import load_checkpoint
from ...training.settings import ModelSettings, TrainingRecipe
from .cifar_training import REPOSITORY, Contender, arguments_of, trained

COMMAND = "python -m pennyweight.bench.experiments.sparse_training"
RECIPE = REPOSITORY / "recipes" / "sparse-training.yaml"
RATES = (1e-3, 3e-3, 1e-2)
DECAYS = (0.0, 0.05)
#: Contender -> its knob: decay of sum |w|^p, strength of sum |w|, share pruned.
KNOBS: dict[str, tuple[float, ...]] = {
    "pWD, p = 0.5": (1e-2, 3e-2, 1e-1),
    "pWD, p = 0.8": (3e-2, 1e-1, 3e-1),
    "pWD, p = 1": (1e-1, 3e-1, 1.0),
    "l1 penalty": (1e-4, 3e-4, 1e-3),
    "pruned": (0.8, 0.92, 0.97),
    "dense": DECAYS,
}


def network() -> nn.Sequential:
    """[n, 1, 28, 28] -> [n, 10]; 106,000 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def pruned(dense: str, amount: float) -> nn.Sequential:
    """The network of a trained directory with that share of its weights, the least of all layers, held at zero."""
    model = network()
    model.load_state_dict(load_checkpoint(dense))
    prune.global_unstructured(_prunable(model), prune.L1Unstructured, amount=amount)
    return model


def _prunable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


class Run(NamedTuple):
    """One training: who, its knob, learning rate and seed."""

    contender: str
    knob: float
    rate: float
    seed: int


def recipe_of(run: Run, runs: Path, decay: float) -> TrainingRecipe:
    """decay: weight decay of AdamW for what is pruned."""
    base = dataclasses.replace(TrainingRecipe.load(RECIPE), shrink=None)
    changes: dict[str, Any] = {}
    optimizer = dataclasses.replace(base.optimizer, name="adamw", options={}, weight_decay=run.knob)
    if run.contender.startswith("pWD"):
        power = float(run.contender.rpartition(" ")[2])
        optimizer = dataclasses.replace(
            base.optimizer, weight_decay=run.knob, options={**base.optimizer.options, "p": power}
        )
    elif run.contender == "l1 penalty":
        optimizer = dataclasses.replace(optimizer, weight_decay=0.0)
        changes["penalties"] = ({"method": "p-norm", "p": 1, "strength": run.knob},)
    elif run.contender == "pruned":
        optimizer = dataclasses.replace(optimizer, weight_decay=decay)
        first = dataclasses.replace(base, optimizer=optimizer, steps=_half(base))
        dense = Contender("pruned, before", first, ()).at(run.rate, run.seed, runs)
        trained(dense, "pruned, before")
        options = {"dense": dense.output, "amount": run.knob}
        changes |= {"model": ModelSettings(f"{__package__}.sparse_training:pruned", options)}
        changes |= {"steps": (base.steps or 0) - _half(base)}
    recipe = dataclasses.replace(base, optimizer=optimizer, **changes)
    return Contender(run.contender, recipe, ()).at(run.rate, run.seed, runs)


def _half(recipe: TrainingRecipe) -> int:
    return (recipe.steps or 0) // 2


def grid(seed: int) -> Iterator[Run]:
    for contender, knobs in KNOBS.items():
        for rate in RATES:
            for knob in knobs:
                yield Run(contender, knob, rate, seed)


def main(arguments=None) -> None:
    options = arguments_of(COMMAND, "sparse-training.md", __doc__, arguments)
    torch.set_num_threads(1)
    for run in sorted(grid(0), key=lambda run: run.contender != "dense"):
        report = trained(recipe_of(run, options.runs, 0.05), f"{run.contender} {run.knob}")
        print(run, report["validation"]["accuracy"], report["seconds"], flush=True)


if __name__ == "__main__":
    main()
