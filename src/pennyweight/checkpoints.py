"""Plain checkpoints: state dicts from safetensors files. Pickles are refused, whatever they are called."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ArtifactError

WEIGHTS = "model.safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of a directory with model.safetensors or its sharded index.

    Raises ArtifactError for pickles (they run code when read), missing or damaged files and packed artifacts.
    """
    source = Path(path)
    refuse_pickle(source)
    tensors: dict[str, Tensor] = {}
    for file in _checkpoint_files(source):
        refuse_pickle(file)
        try:
            with safe_open(file, framework="pt") as content:
                if "pennyweight" in (content.metadata() or {}):
                    raise ArtifactError(f"{file} is a packed artifact, not a checkpoint: open it with pennyweight.load")
                tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} cannot be read as safetensors ({error}); get the file again") from error
    return tensors


def _checkpoint_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ArtifactError(f"{source} does not exist; give a .safetensors file or a directory that holds one")
    if (source / WEIGHTS).is_file():
        return [source / WEIGHTS]
    index = source / f"{WEIGHTS}.index.json"
    if index.is_file():
        try:
            return [source / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{index} is damaged ({error}); get the file again") from error
    single = sorted(source.glob("*.safetensors"))
    if len(single) == 1:
        return single
    for file in sorted(source.iterdir()):
        refuse_pickle(file)
    raise ArtifactError(f"{source} holds no {WEIGHTS}; save the checkpoint with safetensors.torch.save_file")


def refuse_pickle(path: Path) -> None:
    """Raise ArtifactError if the path is a pickle by its name or its first bytes."""
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise _pickle_error(path)
        with open(path, "rb") as file:
            refuse_pickle_bytes(file.read(8), path)


def refuse_pickle_bytes(start: bytes, path: Path) -> None:
    """Raise ArtifactError if the first eight bytes of a file are those of a pickle or of a zip of pickles.

    A safetensors file begins with the length of its header, whose upper four bytes are zero.
    """
    if start[4:8] != bytes(4) and (start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and 2 <= start[1] <= 5)):
        raise _pickle_error(path)


def _pickle_error(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} is a pickle, and reading a pickle can run any code: pennyweight never does. If you trust it, convert "
        "it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
    )
