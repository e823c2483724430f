"""What the tasks of the benchmark are learned from.

    task = load_task("cifar10", train=2000, test=1000, seed=0)
    task.train[0].shape, task.train[1].shape        # [2000, 3, 32, 32], [2000]

Keywords and solids are made in code. The public sets are read from the folder PENNYWEIGHT_DATA (default: ../shared/data
beside the repository), which holds

    fashion_mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz       as published
    cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin               as published, or cifar10/{train_1..5,test}.npz
    sst2/{train,dev}.tsv.gz                                             sentence, label
    cola/{train,dev}.tsv.gz                                             source, label, mark, sentence
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import DataError, UnknownNameError
from . import sounds, surfaces

REPOSITORY = Path(__file__).parents[4]

#: Token ids of text: 0 fills up, 1 starts a sentence, words follow.
VOCABULARY, TOKENS = 4096, 32
POINTS = 128


@dataclass(frozen=True)
class TaskData:
    """One task's samples.

    train, test: (inputs, labels int64 [n]). Inputs are float32 [n, channels, height, width] (images, sounds), float32
    [n, 3, points] or int64 [n, tokens]. raw: the test images uint8 [n, height, width, channels], to be corrupted and
    then made inputs by `images_to_inputs`; None for other tasks. balanced: accuracy is the mean of the classes' own.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    raw: NDArray[np.uint8] | None = None
    balanced: bool = False


@lru_cache(maxsize=8)
def load_task(name: str, train: int, test: int, seed: int = 0) -> TaskData:
    """So many samples of a task, the same for the same arguments; all there are where fewer exist.

    Raises UnknownNameError on another name, DataError where a public set is not in its folder.
    """
    if name not in _LOADERS:
        raise UnknownNameError("task", name, _LOADERS)
    return _LOADERS[name](train, test, seed)


def images_to_inputs(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, height, width, channels] -> float32 [n, channels, height, width], -1 to 1."""
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def hashed_words(sentences: Sequence[str], vocabulary: int = VOCABULARY, tokens: int = TOKENS) -> Tensor:
    """Token ids int64 [n, tokens]. Words and marks in lower case get 2 + crc32 mod (vocabulary - 2): no fitting, and the
    same ids everywhere. Longer sentences are cut."""
    ids = torch.zeros(len(sentences), tokens, dtype=torch.int64)
    for row, sentence in zip(ids, sentences):
        words = re.findall(r"\w+|[^\w\s]", sentence.lower())[: tokens - 1]
        codes = [1, *(2 + zlib.crc32(word.encode()) % (vocabulary - 2) for word in words)]
        row[: len(codes)] = torch.tensor(codes)
    return ids


# -------------------------------------------------------------------------------------------------------------- tasks


def _fashion_mnist(train: int, test: int, seed: int) -> TaskData:
    folder = _folder("fashion_mnist")

    def read(split: str) -> tuple[NDArray, NDArray]:
        pixels, labels = (
            np.frombuffer(_bytes(folder / f"{split}-{part}-ubyte.gz"), np.uint8, offset=offset)
            for part, offset in (("images-idx3", 16), ("labels-idx1", 8))
        )
        return pixels.reshape(-1, 28, 28, 1), labels

    return _images(read("train"), read("t10k"), train, test, seed)


def _cifar10(train: int, test: int, seed: int) -> TaskData:
    batches = range(1, 2 + min(max(train - 1, 0) // 10_000, 4))
    parts = [_cifar_batch("train", i) for i in batches]
    pixels, labels = (np.concatenate(part) for part in zip(*parts))
    return _images((pixels, labels), _cifar_batch("test"), train, test, seed)


def _images(train: tuple[NDArray, NDArray], test: tuple[NDArray, NDArray], n: int, m: int, seed: int) -> TaskData:
    chosen = np.random.default_rng([seed, 2]).permutation(len(train[0]))[:n]
    raw = test[0][:m]
    return TaskData(
        (images_to_inputs(train[0][chosen]), torch.tensor(train[1][chosen], dtype=torch.int64)),
        (images_to_inputs(raw), torch.tensor(test[1][:m], dtype=torch.int64)),
        classes=10,
        raw=raw,
    )


def _cifar_batch(split: str, number: int = 0) -> tuple[NDArray, NDArray]:
    """10,000 images uint8 [n, 32, 32, 3] and labels."""
    published = _data_folder() / "cifar-10-batches-bin"
    if published.is_dir():
        name = f"data_batch_{number}.bin" if split == "train" else "test_batch.bin"
        rows = np.frombuffer(_bytes(published / name), np.uint8).reshape(-1, 3073)
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
    path = _folder("cifar10") / (f"train_{number}.npz" if split == "train" else "test.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            return _from_residual(file["r"]), file["y"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _from_residual(residual: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images [n, 32, 32, 3] from [3, 32, 32, n], the differences modulo 256 to the median-edge prediction (LOCO-I) of the
    planes green, red - green and blue - green."""
    planes = np.zeros((3, residual.shape[1] + 1, residual.shape[2] + 1, residual.shape[3]), np.int16)
    colours = np.empty(residual.shape, np.uint8)
    for i in range(residual.shape[1]):
        for j in range(residual.shape[2]):
            left, above, corner = planes[:, i + 1, j], planes[:, i, j + 1], planes[:, i, j]
            if i == 0:
                above = corner = left
            elif j == 0:
                left = corner = above
            value = residual[:, i, j] + np.clip(
                left + above - corner, np.minimum(left, above), np.maximum(left, above)
            )
            green = value[0] & 255
            colours[:, i, j] = (value[1] + green) & 255, green, (value[2] + green) & 255
            red, _, blue = colours[:, i, j].astype(np.int16)
            planes[:, i + 1, j + 1] = green, red - green, blue - green
    return np.ascontiguousarray(colours.transpose(3, 1, 2, 0))


def _sst2(train: int, test: int, seed: int) -> TaskData:
    def read(split: str) -> list[tuple[str, int]]:
        rows = (line.rsplit("\t", 1) for line in _lines(_folder("sst2") / f"{split}.tsv.gz"))
        return [(sentence, int(label)) for sentence, label in rows]

    return _texts(read("train"), read("dev"), train, test, seed)


def _cola(train: int, test: int, seed: int) -> TaskData:
    def read(split: str) -> list[tuple[str, int]]:
        rows = (line.split("\t") for line in _lines(_folder("cola") / f"{split}.tsv.gz"))
        return [(row[3], int(row[1])) for row in rows]

    # 70 % of the sentences are acceptable; a constant answer should not look like knowledge.
    return _texts(read("train"), read("dev"), train, test, seed, balanced=True)


def _texts(
    train: list[tuple[str, int]], test: list[tuple[str, int]], n: int, m: int, seed: int, balanced: bool = False
) -> TaskData:
    order = np.random.default_rng([seed, 3])
    chosen = [train[i] for i in order.permutation(len(train))[:n]]
    kept = [test[i] for i in np.random.default_rng(3).permutation(len(test))[:m]]
    halves = [
        (hashed_words([s for s, _ in rows]), torch.tensor([y for _, y in rows], dtype=torch.int64))
        for rows in (chosen, kept)
    ]
    return TaskData(halves[0], halves[1], classes=2, balanced=balanced)


def _keywords(train: int, test: int, seed: int) -> TaskData:
    return TaskData(sounds.keywords(train, 1 + seed), sounds.keywords(test, 0), classes=len(sounds.WORDS))


def _solids(train: int, test: int, seed: int) -> TaskData:
    made = (surfaces.clouds(train, POINTS, 1 + seed), surfaces.clouds(test, POINTS, 0))
    return TaskData(*made, classes=len(surfaces.SOLIDS))


# -------------------------------------------------------------------------------------------------------------- files


def _data_folder() -> Path:
    return Path(os.environ.get("PENNYWEIGHT_DATA", REPOSITORY.parent / "shared" / "data")).expanduser()


def _folder(name: str) -> Path:
    folder = _data_folder() / name
    if not folder.is_dir():
        raise DataError(
            f"there is no {folder}; set PENNYWEIGHT_DATA to the folder that holds {name}, or leave that task out with "
            "--task keywords --task solids ..."
        )
    return folder


def _bytes(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _lines(path: Path) -> list[str]:
    return [line for line in _bytes(path).decode("utf-8").split("\n") if line]


_LOADERS: dict[str, Callable[[int, int, int], TaskData]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "sst2": _sst2,
    "cola": _cola,
    "keywords": _keywords,
    "solids": _solids,
}
TASKS = tuple(_LOADERS)
