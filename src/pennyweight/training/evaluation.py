"""What is minimised, and how a model does on a split of the data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compress.data import output_tensor
from ..compress.observe import evaluating
from ..errors import DataError
from .data import Split
from .settings import LossSettings, TrainingRecipe

_BATCH = 512


def task_loss(output: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """Mean loss of output [..., classes] and integer targets [...], or of two tensors of one shape for mse.

    Raises DataError if the shapes or kinds do not fit the loss.
    """
    classes = settings.name == "cross-entropy"
    if output.shape[: -1 if classes else None] != targets.shape or targets.is_floating_point() == classes:
        wanted = (
            "integer targets of the output's shape without its last axis" if classes else "real targets of its shape"
        )
        raise DataError(
            f"{settings.name} needs {wanted}: the output is {list(output.shape)}, the targets are {targets.dtype} "
            f"{list(targets.shape)}; choose another loss or mend the data"
        )
    if not classes:
        return F.mse_loss(output, targets)
    return F.cross_entropy(output.flatten(0, -2), targets.flatten(), label_smoothing=settings.label_smoothing)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, settings: LossSettings, accelerator: Any) -> dict[str, float]:
    """Mean loss, without smoothing and teacher, and for classes the accuracy in 0..1; every process takes its share.

    All make as many forward passes, since processes that hold parts of one model gather its weights together.
    """
    classes = settings.name == "cross-entropy"
    sums = torch.zeros(4, device=accelerator.device)  # loss, samples; right answers, answers
    with evaluating(model):
        for everyones in torch.arange(len(split)).split(_BATCH * accelerator.num_processes):
            rows = everyones[accelerator.process_index :: accelerator.num_processes]
            inputs, targets = split.batch(rows if len(rows) else everyones[:1])
            output = output_tensor(model(inputs)).float()
            if not len(rows):
                continue  # this process had no share of the last batch
            sums[0] += task_loss(output, targets, LossSettings(settings.name)) * len(rows)
            sums[1] += len(rows)
            if classes:
                sums[2] += (output.argmax(-1) == targets).sum()
                sums[3] += targets.numel()
    loss, samples, right, answers = accelerator.reduce(sums, "sum").tolist()
    return {"loss": loss / samples} | ({"accuracy": right / answers} if classes else {})


def try_out(model: nn.Module, train: Split, recipe: TrainingRecipe) -> None:
    """Two samples through the untrained model; raises DataError if it does not take them or has too few outputs."""
    inputs, targets = train.batch(torch.arange(2))
    name, data = recipe.model.name, recipe.data.name
    try:
        with torch.no_grad(), evaluating(model):
            output = output_tensor(model(inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} does not take inputs of {data}, which are {inputs.dtype} {list(inputs.shape)}: {reason}"
        ) from error
    task_loss(output.float(), targets, recipe.loss)
    if recipe.loss.name == "cross-entropy" and int(train.targets.max()) >= output.shape[-1]:
        raise DataError(
            f"{data} has class {int(train.targets.max())}, but {name} gives {output.shape[-1]} logits; set its number "
            "of classes in model.options"
        )
