"""MimicNorm against batch norm and no norm: accuracy after the same steps, and what a training step costs.

    python -m pennyweight.bench.experiments.mimicnorm        (about three minutes on one core)

A ResNet-14 on small images of Fashion-MNIST, converted by one call of `mimicnorm`. What is trained is
recipes/mimicnorm.yaml, with other norms and learning rates. The cost of a step is measured on random images: time of
the processor, networks in turn, and bytes of the distinct tensors that the forward keeps for the backward.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import PlanError
from ...layers.mimicnorm import mimicnorm
from ...layers.residual_scaling import scale_residuals
from ...models.resnet_cifar import ResNet
from ...training.settings import TrainingRecipe
from ..results import Table, write_results
from .command_line import REPOSITORY, arguments_of
from .recipe_runs import Contender
from .supervised import Row, accuracy_cell, at_the_edge, loss_cell, measure, rates_table, verdict

COMMAND = "python -m pennyweight.bench.experiments.mimicnorm"
RECIPE = REPOSITORY / "recipes" / "mimicnorm.yaml"
RATES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
BATCH, REPEATS = 128, 15
NORM, NONE, MIMIC = "batch norm", "no norm", "MimicNorm"
#: Row -> `norms` of the model.
ROWS: dict[str, Literal["batch", "none", "mimic"]] = {NORM: "batch", NONE: "none", MIMIC: "mimic"}


def resnet14(norms: Literal["batch", "none", "mimic"] = "mimic") -> nn.Module:
    """Two blocks in each of three stages, width 8, for one channel. Raises `PlanError` for norms there are not."""
    model = ResNet((2, 2, 2), 8, "subsample", in_channels=1)
    if norms == "batch":
        return model
    if norms == "none":
        return scale_residuals(model, 1.0)
    if norms == "mimic":
        return mimicnorm(model)
    raise PlanError(f"norms is {norms!r}; choose 'batch', 'none' or 'mimic'")


def kept_for_backward(model: nn.Module, images: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps of a training forward, but for parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(images)
    del output  # only now may storages be used again
    return sum(kept.values())


def step_costs(models: Mapping[str, nn.Module], images: Tensor, targets: Tensor) -> dict[str, float]:
    """Median seconds of the processor that a step of each takes: forward, backward and SGD."""
    optimizers = {name: torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9, fused=True) for name, m in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(REPEATS + 1):
        for name, model in models.items():
            started = time.process_time()
            F.cross_entropy(model(images), targets).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if repeat:
                seconds[name].append(time.process_time() - started)
    return {name: median(values) for name, values in seconds.items()}


def conclusions(found: Mapping[str, Row], seconds: Mapping[str, float], memory: Mapping[str, int]) -> list[str]:
    """What the numbers say of the claims."""
    lines = [
        f"{MIMIC} against {other}: {verdict(found[MIMIC].accuracy, found[other].accuracy)}." for other in (NORM, NONE)
    ]
    gap = fmean(found[NORM].accuracy) - fmean(found[NONE].accuracy)
    back = fmean(found[MIMIC].accuracy) - fmean(found[NONE].accuracy)
    if gap > 0:
        lines.append(f"{MIMIC} recovers {100 * back / gap:.0f} % of what the network loses without norms.")
    saved = 100 * (1 - memory[MIMIC] / memory[NORM])
    lines.append(
        f"Kept for the backward: {abs(saved):.0f} % {'less' if saved > 0 else 'more'} than with batch norm; the paper "
        "has 20 to 30 % less memory."
    )
    faster = 100 * (1 - seconds[MIMIC] / seconds[NORM])
    lines.append(f"A training step is {abs(faster):.0f} % {'faster' if faster > 0 else 'slower'} than with batch norm.")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "mimicnorm.md", __doc__, arguments)
    recipe = TrainingRecipe.load(RECIPE)
    found: dict[str, Row] = {}
    for name, norms in ROWS.items():
        model = dataclasses.replace(recipe.model, options={"norms": norms})
        found[name] = measure(
            Contender(name, dataclasses.replace(recipe, model=model), RATES), options.seeds, options.runs
        )
    torch.manual_seed(0)
    models = {name: resnet14(norms) for name, norms in ROWS.items()}
    images, targets = torch.randn(BATCH, 1, 14, 14), torch.randint(10, (BATCH,))
    memory = {name: kept_for_backward(model, images) for name, model in models.items()}
    seconds = step_costs(models, images, targets)
    write_results(
        options.out,
        title="MimicNorm: one norm on the logits instead of batch norms (arXiv 2010.09278)",
        claim="a residual network with centred filters and one batch norm, on its logits, comes up to the accuracy "
        "of one with batch norms everywhere, with 20 to 30 percent less training memory and faster steps.",
        tables=[
            Table(
                f"Test accuracy in percent, training loss at the end; cost of a step of {BATCH} images",
                ["network", "learning rate", "accuracy", "loss", "ms a step", "MB kept for the backward"],
                {
                    name: [
                        f"{row.rate:g}",
                        accuracy_cell(row),
                        loss_cell(row),
                        f"{1000 * seconds[name]:.1f}",
                        f"{memory[name] / 1e6:.1f}",
                    ]
                    for name, row in found.items()
                },
            ),
            rates_table(found),
        ],
        command=COMMAND,
        seeds=options.seeds,
        data=f"Fashion-MNIST at 14 x 14 pixels, the first {recipe.data.options['samples']:,} training images "
        f"({recipe.data.validation:,} of them for the learning rate), all test images. ResNet-14 of width 8, "
        f"{recipe.steps} steps of {recipe.batch} images, SGD with momentum 0.9 and decay "
        f"{recipe.optimizer.weight_decay:g}, cosine with warm-up. No norm: He initialisation, biases.",
        conclusion_lines=[*conclusions(found, seconds, memory), *at_the_edge(found)],
    )
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
