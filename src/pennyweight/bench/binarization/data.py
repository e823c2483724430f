"""What the tasks of the benchmark are learned from.

    data = task_data("cifar10", train=2000, test=1000, seed=0)
    inputs, labels = data.train.batch(rows)

Keywords and solids are made in code; the public sets are those of `pennyweight train`, read from PENNYWEIGHT_DATA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import UnknownNameError
from ...training.data import Split, load_data
from ...training.settings import DataSettings
from . import sounds, surfaces
from .corruptions import CORRUPTIONS, SEVERITIES, corrupt

Loader = Callable[[str, int, int, int], "TaskData"]

TOKENS, VOCABULARY = 32, 8192
POINTS = 64


@dataclass(frozen=True)
class TaskData:
    """One task's samples. balanced: accuracy is the mean over the classes, because one of them dominates."""

    train: Split
    test: Split
    classes: int
    balanced: bool = False


@lru_cache(maxsize=8)
def task_data(name: str, train: int, test: int, seed: int = 0) -> TaskData:
    """So many samples of a task, the same for the same arguments, or all there are. The seed draws those of training.

    Raises UnknownNameError on another name, DataError where a public set is not there.
    """
    if name not in _LOADERS:
        raise UnknownNameError("task", name, _LOADERS)
    return _LOADERS[name](name, train, test, seed)


@lru_cache(maxsize=len(CORRUPTIONS) * len(SEVERITIES))
def corrupted(test: Split, kind: str, severity: int) -> Split:
    """A split of images, corrupted; kept for the next network."""
    images = corrupt(test.inputs.permute(0, 2, 3, 1).numpy(), kind, severity)
    return replace(test, inputs=torch.tensor(images).permute(0, 3, 1, 2))


def accuracy(predicted: Tensor, labels: Tensor, balanced: bool = False) -> float:
    """Share of equal entries, 0 to 1; balanced: the mean of the shares within each class that occurs."""
    right = (predicted == labels).double()
    if not balanced:
        return right.mean().item()
    return torch.stack([right[labels == c].mean() for c in labels.unique()]).mean().item()


def _public(classes: int, balanced: bool = False, **settings: Any) -> Loader:
    def load(name: str, train: int, test: int, seed: int) -> TaskData:
        # CIFAR-10 is read in files of 10,000: no more of them than needed.
        samples = 10_000 * -(-train // 10_000) if name == "cifar10" else None
        found = load_data(DataSettings(name, samples=samples, **settings), seed=0)
        assert found.test is not None
        drawn = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(seed))[:train]
        kept = torch.randperm(len(found.test), generator=torch.Generator().manual_seed(0))[:test]
        return TaskData(found.train.rows(drawn), found.test.rows(kept), classes, balanced)

    return load


def _keywords(name: str, train: int, test: int, seed: int) -> TaskData:
    return _made(sounds.keywords(train, 1 + seed), sounds.keywords(test, 0), len(sounds.WORDS))


def _solids(name: str, train: int, test: int, seed: int) -> TaskData:
    return _made(surfaces.clouds(train, POINTS, 1 + seed), surfaces.clouds(test, POINTS, 0), len(surfaces.SOLIDS))


def _made(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> TaskData:
    return TaskData(Split(*train), Split(*test), classes)


_LOADERS: dict[str, Loader] = {
    "fashion-mnist": _public(10),
    "cifar10": _public(10),
    "sst2": _public(2, length=TOKENS, vocabulary=VOCABULARY),
    "cola": _public(2, balanced=True, length=TOKENS, vocabulary=VOCABULARY),
    "keywords": _keywords,
    "solids": _solids,
}
TASKS = tuple(_LOADERS)
