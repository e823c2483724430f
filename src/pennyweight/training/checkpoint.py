"""Checkpoints of a training: one safetensors file, replaced in one step, so a kill leaves the old or the new one.

    tensors     model.NAME, average.NAME, optimizer.INDEX.KEY, diagnostics.NAME
    metadata    "state": JSON with the recipe, the counters, and whatever of the optimizer is no tensor

Nothing is pickled. No generator's state is there because none is needed: see `randomness`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..checkpoints import refuse_pickle
from ..errors import ArtifactError
from .parallel import placed

CHECKPOINT = "checkpoint.safetensors"
_VERSION = 1
#: Keys of a recipe that say where and how often to write, and nothing of what is trained.
_FREE_KEYS = ("output", "log_every", "checkpoint_every", "tensorboard")


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by name as above. state: plain values."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `name.`, without it."""
        return {k.removeprefix(f"{name}."): v for k, v in self.tensors.items() if k.startswith(f"{name}.")}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one step. Tensors may share memory; each name gets its own copy in the file."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(save(stored, dict(metadata or {})))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {path}: {error}") from error


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint in one step. state: plain values that JSON can hold (floats come back exactly)."""
    save_tensors(path, tensors, {"state": json.dumps({"version": _VERSION, **state})})


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises ArtifactError if the file is missing, damaged, a pickle, of a newer version or no training checkpoint."""
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as content:
            text = (content.metadata() or {}).get("state")
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        state = json.loads(text) if text is not None else None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a training checkpoint ({error}); start anew") from error
    if not isinstance(state, dict) or "recipe" not in state:
        raise ArtifactError(f"{path} is no training checkpoint; give the output directory of a training")
    if state.get("version") != _VERSION:
        raise ArtifactError(
            f"{path} is of version {state.get('version')!r}; this pennyweight reads {_VERSION}: update it"
        )
    return Checkpoint(tensors, state)


def require_same_recipe(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ArtifactError naming the keys in which two recipes (as plain values) differ, if they do."""
    before, now = dict(_leaves(stored)), dict(_leaves(json.loads(json.dumps(wanted))))
    different = [
        f"{key} is {before.get(key)!r} there and {now.get(key)!r} here"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and key not in _FREE_KEYS
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ArtifactError(
            f"{path} is the checkpoint of another recipe: {'; '.join(different[:3])}{more}; "
            "resume with that recipe, or give another output"
        )


def split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any optimizer as tensors by "INDEX.KEY" and plain values; raises ArtifactError for other state."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in whole["state"].items():
        plain[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain[str(index)][key] = value
    rest = {"state": plain} | {key: value for key, value in whole.items() if key != "state"}
    try:
        json.dumps(rest)
    except TypeError as error:
        raise ArtifactError(f"the state of {type(optimizer).__name__} cannot be stored as JSON: {error}") from error
    return tensors, rest


def join_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put back what `split_optimizer` took apart; state of a divided parameter's shape is divided like it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state[int(index)][key] = placed(tensor, parameters[int(index)])
    optimizer.load_state_dict({**rest, "state": state})


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
