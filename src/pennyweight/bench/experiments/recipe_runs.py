"""What experiments that train by recipes share: small images, rows at a learning rate and seed, runs kept on disk.

Every run is a directory below --runs whose name is a digest of its recipe: an interrupted experiment goes on where it
stopped, and experiments share the runs they have in common.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from ...progress import progress_bars
from ...training.data import Split, TrainingData, load_data
from ...training.loop import REPORT, train
from ...training.settings import DataSettings, TrainingRecipe


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
    """One row of an experiment: its name, how it is trained but for the learning rate, and the rates of its grid, if it
    has one."""

    name: str
    recipe: TrainingRecipe
    rates: Sequence[float] = ()

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


def trained(recipe: TrainingRecipe, name: str) -> dict[str, Any]:
    """The report of a run, from its directory if it has been trained already."""
    path = Path(recipe.output) / REPORT
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    with progress_bars() as progress:
        label = f"{name}, lr {recipe.optimizer.lr:g}, seed {recipe.seed}"
        return train(recipe, resume=True, progress=lambda _, done, total: progress(label, done, total)).report
