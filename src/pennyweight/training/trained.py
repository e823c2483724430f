"""What `pennyweight train` leaves behind, as a model to shrink, judge and report on, with its data.

model, recipe = load_trained("out/pwd")
small = pw.shrink(model, size="8kB", data=samples_of(recipe, 512))
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints import WEIGHTS, load_checkpoint
from ..errors import ArtifactError, PlanError
from ..layers.quantised import QuantisedLayer, weight_chain
from .building import make_model
from .data import Split, load_data
from .fold import plain
from .prepare import prepare
from .settings import TrainingRecipe

RECIPE = "recipe.yaml"
_BATCH = 64


def is_trained(directory: Path) -> bool:
    """Whether a directory is what a training has written."""
    return (directory / RECIPE).is_file() and (directory / WEIGHTS).is_file()


def load_trained(directory: str | os.PathLike[str]) -> tuple[nn.Module, TrainingRecipe]:
    """The model of a finished training as a plain network in eval mode, and its recipe.

    Weight transforms that are not discrete are folded. Raises `PlanError` if the layers are low-bit ones, which only
    their packed form is good for, `ArtifactError` if files are missing or do not fit each other.
    """
    path = Path(directory)
    recipe = TrainingRecipe.load(path / RECIPE)
    model = make_model(dataclasses.replace(recipe.model, weights=None))
    if recipe.prepare is not None:
        prepare(model, recipe.prepare)
        require_plain(model, f"{path}: its packed form lies in {path / 'packed'}")
    try:
        model.load_state_dict(load_checkpoint(path / WEIGHTS))
    except RuntimeError as error:
        raise ArtifactError(
            f"{path / WEIGHTS} does not fit {RECIPE} beside it: {' '.join(str(error).split())}"
        ) from None
    return plain(deployed(model)), recipe


def deployed(model: nn.Module) -> nn.Module:
    """What of a trained model goes on: its attribute `deployed` where it trains beside others, else all of it."""
    found = getattr(model, "deployed", None)
    return found if isinstance(found, nn.Module) else model


def require_plain(model: nn.Module, remedy: str) -> None:
    """Raise `PlanError` if what trains in a model's layers is more than functions of weights that can be folded."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantisedLayer):
            low_bit = any(type(transform).discrete for transform in weight_chain(layer) or ())
            if low_bit or layer.input_quantizer is not None or layer.output_transform is not None:
                raise PlanError(f"{name} is a layer of low-bit weights or inputs, which shrink does not take; {remedy}")


def samples_of(recipe: TrainingRecipe, count: int, held_out: bool = False) -> list[Tensor]:
    """Batches of at most `count` inputs of a recipe's training split, drawn by its seed, not augmented.

    held_out: of its validation split instead; of the test split if there is none.
    """
    data = load_data(recipe.data, recipe.seed)
    return calibration((data.validation or data.test or data.train) if held_out else data.train, count, recipe.seed)


def calibration(split: Split, count: int, seed: int) -> list[Tensor]:
    """Batches of at most `count` inputs of a split."""
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]
    return [split.batch(part)[0] for part in rows.split(_BATCH)]
