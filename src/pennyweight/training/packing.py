"""The last step of a training: the finished model as a small file.

shrink in the recipe      weight transforms folded, then the best file of that size, exact zeros kept zeros
otherwise                 `convert`: low-bit layers as their codes, sparse weights exactly
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..artifact import save
from ..compress.shrink import shrink
from ..errors import BudgetError, PlanError, WeightError, warn
from ..report import report
from .convert import convert
from .data import Split
from .fold import plain
from .settings import ShrinkSettings, TrainingRecipe
from .sparse import is_sparse
from .trained import calibration, deployed

Progress = Callable[[str, int, int], None]


def can_pack(model: nn.Module, recipe: TrainingRecipe) -> bool:
    """Whether a trained model has a packed form that the recipe asks for, or that loses nothing."""
    return recipe.prepare is not None or recipe.shrink is not None or is_sparse(model)


def write_packed(
    model: nn.Module, recipe: TrainingRecipe, train: Split, directory: Path, progress: Progress
) -> tuple[nn.Module, int] | None:
    """Pack the model, on the CPU and in place, and save it; the packed model and its bytes.

    train: what shrink calibrates on. None, and a warning, if there is nothing to pack or the size is out of reach.
    """
    model = deployed(model)
    try:
        small = (
            convert(model) if recipe.shrink is None else _shrunk(plain(model), recipe, recipe.shrink, train, progress)
        )
        made = report(small, name=recipe.output)
        details = made.to_dict() | {"source": recipe.output}
        return small, save(small, directory, plan=made.plan and made.plan.to_yaml(), report=details)
    except (BudgetError, PlanError, WeightError) as error:
        warn(f"the model is trained, but not packed: {error}")
        return None


def _shrunk(
    model: nn.Module, recipe: TrainingRecipe, wanted: ShrinkSettings, train: Split, progress: Progress
) -> nn.Module:
    return shrink(
        model,
        size=wanted.size,
        bits=wanted.bits,
        ratio=wanted.ratio,
        data=calibration(train.to(torch.device("cpu")), wanted.samples, recipe.seed),
        methods=wanted.methods or None,
        preset=wanted.preset,
        recover=wanted.recover,
        seed=recipe.seed,
        progress=progress,
    )
