"""Data held whole in memory: images as uint8, sentences as token ids, batches made by one indexing operation.

    data = load_data(DataSettings("fashion-mnist", validation=5000), seed=0)
    inputs, targets = data.train.batch(rows, data.train.augmentation(len(rows), generator))

Built-in sets lie in the folder PENNYWEIGHT_DATA (default: ../shared/data beside the repository) and are read by that
folder's load.py. `module:factory` returns {"train": (inputs, targets), "validation": ..., "test": ...}, of which only
train is needed: tensors with the samples first.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, UnknownNameError
from ..factory import FACTORY, call_factory
from .randomness import generator
from .settings import DataSettings

#: Mean and standard deviation of each channel over the training split, pixels in 0..1.
_STATISTICS = {
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
_CIFAR_FILE = 10_000
_PADDING, _UNKNOWN = 0, 1


@dataclass(frozen=True)
class Split:
    """Samples of one kind.

    inputs: uint8 images [n, channels, height, width], or anything else with the samples first (int64 ids, float32).
    targets: int64 classes [n, ...] or float32. mean, std: of each channel, pixels in 0..1; images come out as
    (pixel / 255 - mean) / std. crop: pixels of black padding around an image, of which a random window is taken.
    flip: mirror half of the images.
    """

    inputs: Tensor
    targets: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def images(self) -> bool:
        return self.inputs.dtype == torch.uint8 and self.inputs.ndim == 4

    def to(self, device: torch.device) -> Split:
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def rows(self, chosen: Tensor) -> Split:
        """The split of those rows, without augmentation."""
        return replace(self, inputs=self.inputs[chosen], targets=self.targets[chosen], crop=0, flip=False)

    def augmentation(self, count: int, draw: torch.Generator) -> Tensor | None:
        """Random window and mirroring of `count` images: int64 [count, 3], (down, right, mirrored); None if none."""
        if not self.crop and not self.flip:
            return None
        window = torch.randint(2 * self.crop + 1, (count, 2), generator=draw)
        mirrored = (
            torch.randint(2, (count, 1), generator=draw) if self.flip else torch.zeros(count, 1, dtype=torch.long)
        )
        return torch.cat([window, mirrored], 1)

    def batch(self, rows: Tensor, augmentation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these rows; images as float32, augmented as told by `augmentation`."""
        rows = rows.to(self.inputs.device)
        inputs, targets = self.inputs[rows], self.targets[rows]
        if not self.images:
            return inputs, targets
        if augmentation is not None:
            inputs = _windows(inputs, augmentation.to(inputs.device), self.crop)
        scale = inputs.new_tensor(self.std, dtype=torch.float32).mul(255).reciprocal()
        offset = inputs.new_tensor(self.mean, dtype=torch.float32) / inputs.new_tensor(self.std, dtype=torch.float32)
        return inputs.float() * scale[:, None, None] - offset[:, None, None], targets


@dataclass(frozen=True)
class TrainingData:
    """validation: the set's own or carved from its training split, None if not asked for. test: None where the set has
    none."""

    train: Split
    validation: Split | None
    test: Split | None

    def to(self, device: torch.device) -> TrainingData:
        return TrainingData(
            self.train.to(device),
            None if self.validation is None else self.validation.to(device),
            None if self.test is None else self.test.to(device),
        )


def load_data(settings: DataSettings, seed: int) -> TrainingData:
    """The data of a recipe. Raises DataError if it is missing, empty or not of the form above, UnknownNameError for
    names there are not."""
    if FACTORY.fullmatch(settings.name):
        splits = _from_factory(settings)
    elif settings.name in BUILT_IN:
        splits = BUILT_IN[settings.name](settings)
    else:
        raise UnknownNameError("data set", settings.name, BUILT_IN)
    train, test = splits["train"], splits.get("test")
    if settings.samples is not None:
        train = train.rows(torch.arange(min(settings.samples, len(train))))
    if (settings.crop or settings.flip) and not train.images:
        raise DataError(f"{settings.name} holds no uint8 images [n, channels, height, width]; leave out crop and flip")
    if settings.validation >= len(train):
        raise DataError(f"{settings.name}: validation takes {settings.validation} of {len(train)} training samples")
    validation = splits.get("validation")
    if settings.validation and validation is not None:
        raise DataError(f"{settings.name} has a validation split of its own; leave out validation")
    if settings.validation:
        order = torch.randperm(len(train), generator=generator(seed, "validation"))
        validation = train.rows(order[: settings.validation].sort().values)
        train = train.rows(order[settings.validation :].sort().values)
    return TrainingData(replace(train, crop=settings.crop, flip=settings.flip), validation, test)


def data_folder() -> Path:
    """The folder with the built-in sets; raises DataError with the remedy."""
    beside = Path(__file__).parents[4] / "shared" / "data"
    folder = Path(os.environ.get("PENNYWEIGHT_DATA", beside)).expanduser()
    if not (folder / "load.py").is_file():
        raise DataError(f"no load.py in {folder}; set PENNYWEIGHT_DATA to the folder that holds the data sets")
    return folder


@cache
def data_sets() -> ModuleType:
    """The data folder's own load.py, imported by its path; raises DataError if there is none."""
    spec = importlib.util.spec_from_file_location("pennyweight_data_sets", data_folder() / "load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fashion_mnist(settings: DataSettings) -> dict[str, Split]:
    return {part: _image_split(settings.name, *data_sets().fashion_mnist(part)) for part in ("train", "test")}


def _cifar10(settings: DataSettings) -> dict[str, Split]:
    """Only as many of the five files as there are samples asked for: decoding takes a second each."""
    files = 5 if settings.samples is None else min(5, -(-settings.samples // _CIFAR_FILE))
    train = data_sets().cifar10("train", batches=tuple(range(1, files + 1)))
    return {
        "train": _image_split(settings.name, *train),
        "test": _image_split(settings.name, *data_sets().cifar10("test")),
    }


def _sst2(settings: DataSettings) -> dict[str, Split]:
    return _text_splits(settings, {"train": data_sets().sst2("train"), "test": data_sets().sst2("test")})


def _cola(settings: DataSettings) -> dict[str, Split]:
    """The public part has no test labels: in-domain dev sentences are the test split."""
    return _text_splits(settings, {"train": data_sets().cola("train"), "test": data_sets().cola("dev")})


BUILT_IN: dict[str, Callable[[DataSettings], dict[str, Split]]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "sst2": _sst2,
    "cola": _cola,
}


def _image_split(name: str, images: Any, labels: Any) -> Split:
    """images: uint8 [n, height, width] or [n, height, width, channels]."""
    pixels = torch.tensor(images)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    mean, std = _STATISTICS[name]
    return Split(pixels, torch.tensor(labels, dtype=torch.int64), mean, std)


def _text_splits(settings: DataSettings, sets: Mapping[str, Sequence[tuple[str, int]]]) -> dict[str, Split]:
    """Words of the training split, the most frequent first, as ids [n, length]: 0 is padding, 1 a word not known."""
    words = {part: [_words(sentence) for sentence, _ in rows] for part, rows in sets.items()}
    frequency = Counter(word for sentence in words["train"] for word in sentence)
    by_frequency = sorted(frequency, key=lambda word: (-frequency[word], word))
    ids = {word: i for i, word in enumerate(by_frequency[: settings.vocabulary - 2], start=2)}
    splits = {}
    for part, rows in sets.items():
        tokens = torch.full((len(rows), settings.length), _PADDING)
        for row, sentence in enumerate(words[part]):
            found = [ids.get(word, _UNKNOWN) for word in sentence[: settings.length]]
            tokens[row, : len(found)] = torch.tensor(found)
        splits[part] = Split(tokens, torch.tensor([label for _, label in rows]))
    return splits


def _words(sentence: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", sentence.lower())


def _from_factory(settings: DataSettings) -> dict[str, Split]:
    made = call_factory(settings.name, settings.options)
    if not isinstance(made, Mapping) or "train" not in made or not set(made) <= {"train", "validation", "test"}:
        raise DataError(
            f'{settings.name} must return {{"train": (inputs, targets)}}, and may "validation" and "test" beside'
        )
    splits = {}
    for part, value in made.items():
        if isinstance(value, Split):
            splits[part] = value
            continue
        inputs, targets = value if isinstance(value, tuple | list) and len(value) == 2 else (None, None)
        if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor) or len(inputs) != len(targets):
            raise DataError(f"{settings.name}: {part} must be two tensors of as many samples, (inputs, targets)")
        if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
            raise DataError(f"{settings.name}: the inputs of {part} hold NaN or infinity; remove those samples")
        channels = inputs.shape[1] if inputs.dtype == torch.uint8 and inputs.ndim == 4 else 0
        splits[part] = Split(inputs, targets, (0.0,) * channels, (1.0,) * channels)
    return splits


def _windows(images: Tensor, augmentation: Tensor, crop: int) -> Tensor:
    """A window of each padded image, of the image's size: uint8 [n, channels, height, width]."""
    count, _, height, width = images.shape
    down, right, mirrored = augmentation.unbind(1)
    padded = torch.nn.functional.pad(images, (crop,) * 4)
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = right[:, None] + torch.where(mirrored[:, None].bool(), width - 1 - columns, columns)
    samples = torch.arange(count, device=images.device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
