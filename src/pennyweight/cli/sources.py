"""What MODEL and --data may name, and the loading of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import artifact
from ..checkpoints import load_checkpoint, refuse_pickle
from ..compress.data import Call, Output, output_tensor
from ..errors import ArtifactError, DataError, require
from ..factory import FACTORY, call_factory
from ..models.english_text import calibration_text, held_out_text
from ..models.pretrained import has_tokenizer, load_pretrained, load_tokenizer, quiet_transformers
from ..models.sentence_encoder import SentenceEncoder, copy_side_files, is_sentence_encoder
from ..training.settings import TrainingRecipe
from ..training.trained import is_trained, load_trained, samples_of

BATCH_SIZE = 32
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model")


@dataclass(frozen=True)
class Source:
    """A model and what came with it. directory, tokenizer, encoder: None where there is none. recipe: of the training
    that made it, which knows its data."""

    name: str
    model: nn.Module
    directory: Path | None = None
    tokenizer: Any = None
    encoder: SentenceEncoder | None = None
    recipe: TrainingRecipe | None = None

    @property
    def output(self) -> Output:
        """What of the model's output matters: the embedding, or everything but padding."""
        if self.encoder is not None:
            return self.encoder.output
        return _unpadded if self.tokenizer is not None else output_tensor

    @property
    def reads_text(self) -> bool:
        return self.tokenizer is not None

    def batches(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        if self.encoder is not None:
            return self.encoder.batches(texts, BATCH_SIZE)
        encoder = SentenceEncoder(self.model, self.tokenizer, (), _longest(self.model), Path())
        return encoder.batches(texts, BATCH_SIZE)

    def copy_files(self, target: Path) -> None:
        """Put tokenizer and the like beside the artifact."""
        if self.directory is not None:
            copy_side_files(self.directory, target)


def load_source(name: str) -> Source:
    """The model that MODEL names: a directory (checkpoint, or output of `pennyweight train`), `module:factory`,
    or a hub name "owner/name" (which may be fetched)."""
    path = Path(name)
    if path.is_dir():
        return _from_directory(name, path)
    if path.exists():
        refuse_pickle(path)
        raise ArtifactError(
            f"{name} is a single file; give the directory it lies in with its config.json, or a module:factory "
            "that makes the model and loads it"
        )
    if FACTORY.fullmatch(name):
        model = call_factory(name)
        if not isinstance(model, nn.Module):
            raise ArtifactError(f"{name} returned a {type(model).__name__}; it must return an nn.Module")
        return Source(name, model)
    if _HUB_NAME.fullmatch(name) and not Path(path.parts[0]).exists():
        return _from_directory(name, _from_hub(name))
    raise ArtifactError(
        f"there is no directory {name}; give one with config.json and safetensors, module:factory, or a hub name "
        "owner/model"
    )


def load_packed(directory: Path, reference: Source | None) -> Source:
    """A saved artifact as a source; models that are not transformers' are made by the reference's factory."""
    if is_sentence_encoder(directory):
        encoder = SentenceEncoder.load(directory)
        return Source(str(directory), encoder.model, directory, encoder.tokenizer, encoder)
    if "model_type" in artifact.read_artifact(directory).config:
        model = artifact.load(directory)
    elif reference is not None and FACTORY.fullmatch(reference.name):
        model = artifact.load(directory, model=call_factory(reference.name))
    elif reference is not None and reference.recipe is not None:
        model = artifact.load(directory, model=load_trained(reference.name)[0])
    else:
        raise ArtifactError(
            f"{directory} names no transformers model; give its module:factory, or the directory of its training, as "
            "--reference"
        )
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    return Source(str(directory), model, directory, tokenizer, recipe=None if reference is None else reference.recipe)


def load_data(name: str | None, source: Source, samples: int, held_out: bool = False) -> list[Any] | None:
    """The batches that --data names, at most `samples` samples of them; None if there is no data.

    name: text files (comma between them, a sentence a line), .npy, .npz, .safetensors, or `module:function`. None: the
    data of the recipe that trained the model, or the built-in English text for a model with a tokenizer (held_out: the
    part kept for measuring).
    Raises DataError if the data cannot be read or is empty.
    """
    if name is None:
        if source.recipe is not None:
            return list(samples_of(source.recipe, samples, held_out))
        if not source.reads_text:
            return None
        return source.batches(held_out_text(samples) if held_out else calibration_text(samples))
    if FACTORY.fullmatch(name) and not Path(name).exists():
        return _limited(call_factory(name), samples, name)
    paths = [Path(part) for part in name.split(",")]
    for path in paths:
        if path.suffix != ".npz":  # a zip like some pickles; NumPy is told to read arrays only
            refuse_pickle(path)
        if not path.is_file():
            raise DataError(f"there is no data file {path}; give text, .npy, .npz, .safetensors or module:function")
    if paths[0].suffix in (".npy", ".npz", ".safetensors"):
        if len(paths) > 1:
            raise DataError(f"--data {name} names several files of arrays; give one")
        return _sliced(_arrays(paths[0]), samples, paths[0])
    return source.batches(_lines(paths, source)[:samples])


def some_data(name: str | None, source: Source, samples: int = BATCH_SIZE, held_out: bool = False) -> list[Any]:
    """`load_data` where there must be some; one batch if not said otherwise. Raises DataError if there is none."""
    batches = load_data(name, source, samples, held_out)
    if batches is None:
        raise DataError(f"{source.name} has no tokenizer, so there is no text to run it on; give --data")
    return batches


def _from_directory(name: str, path: Path) -> Source:
    if is_trained(path):
        model, recipe = load_trained(path)
        return Source(name, model, recipe=recipe)
    if is_sentence_encoder(path):
        encoder = SentenceEncoder.load(path)
        return Source(name, encoder.model, path, encoder.tokenizer, encoder)
    model = load_pretrained(path)
    return Source(name, model, path, load_tokenizer(path) if has_tokenizer(path) else None)


def _from_hub(name: str) -> Path:
    hub = require("huggingface_hub", "hf")
    try:
        with quiet_transformers():
            return Path(hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # each version of the hub's client has other errors for "offline"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ArtifactError(
            f"there is no directory {name}, and the hub did not give a model of that name: {reason}"
        ) from error


def _limited(data: Any, samples: int, name: str) -> list[Any]:
    if isinstance(data, Tensor) or hasattr(data, "keys"):
        return [data]
    if not isinstance(data, Iterable):
        raise DataError(f"{name} returned a {type(data).__name__}; it must return or yield batches")

    found: list[Any] = []
    seen = 0
    try:
        for batch in data:
            found.append(batch)
            parts = [batch[key] for key in batch] if hasattr(batch, "keys") else [batch]
            parts = parts[0] if len(parts) == 1 and isinstance(parts[0], list | tuple) else parts
            seen += next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), 1)
            if seen >= samples:
                break
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{name} raised {type(error).__name__}: {error}") from error
    return found


def _arrays(path: Path) -> dict[str, Tensor] | Tensor:
    """One tensor, or several by name."""
    if path.suffix == ".safetensors":
        tensors = load_checkpoint(path)
    else:
        try:
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return _tensor(loaded, path)
            tensors = {key: _tensor(loaded[key], path) for key in loaded.files}
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read as arrays: {error}") from error
    if not tensors:
        raise DataError(f"{path} holds no array")
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


def _tensor(array: np.ndarray, path: Path) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path} holds values of type {array.dtype}; numbers are needed")
    wanted = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}[array.dtype.kind]
    return torch.from_numpy(array.astype(wanted))


def _sliced(arrays: dict[str, Tensor] | Tensor, samples: int, path: Path) -> list[Any]:
    """Batches of the first dimension."""
    named = arrays if isinstance(arrays, dict) else {"": arrays}
    lengths = {len(t) if t.ndim else 0 for t in named.values()}
    if len(lengths) > 1 or 0 in lengths:
        raise DataError(f"{path}: the arrays have {sorted(lengths)} samples; every first dimension must be the samples")
    count = min(lengths.pop(), samples)
    spans = [slice(i, min(i + BATCH_SIZE, count)) for i in range(0, count, BATCH_SIZE)]
    if isinstance(arrays, Tensor):
        return [arrays[span] for span in spans]
    if all(re.fullmatch(r"arr_\d+", key) for key in arrays):  # np.savez without names: positional arguments
        return [tuple(t[span] for t in arrays.values()) for span in spans]
    return [{key: t[span] for key, t in arrays.items()} for span in spans]


def _lines(paths: Sequence[Path], source: Source) -> list[str]:
    if not source.reads_text:
        raise DataError(
            f"{paths[0]} is taken for text, but {source.name} has no tokenizer; give arrays or module:function"
        )
    found: list[str] = []
    for path in paths:
        try:
            found += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as text: {error}") from error
    if not found:
        raise DataError(f"{paths[0]} holds no text; put a sentence on each line")
    return found


def _longest(model: nn.Module) -> int:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", 0)
    return min(longest or 512, 512)


def _unpadded(result: Any, call: Call) -> Tensor:
    """The output with padded positions set to zero, where it has a position for each token."""
    output = output_tensor(result, call)
    mask = call.kwargs.get("attention_mask")
    if mask is None or output.ndim < 3 or output.shape[:2] != mask.shape:
        return output
    return output * mask.to(output)[..., None]
