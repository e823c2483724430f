"""What the tasks of the benchmark are learned from.

    data = task_data("cifar10", train=2000, test=1000, seed=0)
    inputs, labels = data.train.batch(rows)

Keywords and solids are made in code; the public sets are those of `pennyweight train`, read from PENNYWEIGHT_DATA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ...errors import UnknownNameError
from ...training.data import Split, load_data
from ...training.settings import DataSettings
from . import sounds, surfaces
from .corruptions import corrupt

TOKENS, VOCABULARY = 32, 8192
POINTS = 128


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
    return _LOADERS[name](train, test, seed)


@lru_cache(maxsize=1)
def corrupted_inputs(data: TaskData, kind: str, severity: int) -> Tensor:
    """The inputs of an image task's test split, corrupted."""
    images = corrupt(data.test.inputs.permute(0, 2, 3, 1).numpy(), kind, severity)
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    return replace(data.test, inputs=pixels).batch(torch.arange(len(pixels)))[0]


def accuracy(predicted: Tensor, labels: Tensor, balanced: bool = False) -> float:
    """Share of equal entries, 0 to 1; balanced: the mean of the shares within each class that occurs."""
    right = (predicted == labels).double()
    if not balanced:
        return right.mean().item()
    return torch.stack([right[labels == c].mean() for c in labels.unique()]).mean().item()


def _public(classes: int, balanced: bool = False, **settings: int) -> Callable[[str, int, int, int], TaskData]:
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


_LOADERS: dict[str, Callable[[str, int, int, int], TaskData]] = {
    "fashion-mnist": _public(10),
    "cifar10": _public(10),
    "sst2": _public(2, length=TOKENS, vocabulary=VOCABULARY),
    "cola": _public(2, balanced=True, length=TOKENS, vocabulary=VOCABULARY),
    "keywords": _keywords,
    "solids": _solids,
}
TASKS = tuple(_LOADERS)
