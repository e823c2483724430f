"""Weight standardization and batch-channel norm at one, two and four images a batch, against group and batch norm.

    python -m pennyweight.bench.experiments.weight_standardization        (about twenty minutes on one core)

A small residual network on small images of Fashion-MNIST, the same number of images for every row; batch norm at a
large batch is what small ones are to come up to. What is trained is recipes/batch-channel-norm.yaml, with another norm,
batch and learning rate, and with or without standardised filters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal

from torch import nn

from ...errors import PlanError
from ...layers.batch_channel_norm import use_batch_channel_norm
from ...layers.norm_free import replace
from ...models.resnet_cifar import ResNet
from ...training.settings import TrainingRecipe
from ..results import Table, write_results
from .command_line import REPOSITORY, arguments_of
from .recipe_runs import Contender
from .supervised import Row, accuracy_cell, at_the_edge, loss_cell, measure, rates_table, verdict

COMMAND = "python -m pennyweight.bench.experiments.weight_standardization"
RECIPE = REPOSITORY / "recipes" / "batch-channel-norm.yaml"
GROUPS, WIDTH = 4, 8
LARGE = 16
SMALL = (1, 2, 4)
#: An image of a batch: rates grow with the batch.
RATES = (1.5e-3, 5e-3, 1.5e-2, 5e-2)
#: Row -> norm, and whether filters are standardised.
ROWS: dict[str, tuple[str, bool]] = {
    "BN": ("batch", False),
    "GN": ("group", False),
    "GN + WS": ("group", True),
    "BCN + WS": ("batch-channel", True),
}


def small_resnet(norm: Literal["batch", "group", "batch-channel"] = "batch-channel") -> ResNet:
    """A block in each of two stages, for one channel. Raises `PlanError` for a norm there is not."""
    model = ResNet((1, 1), WIDTH, "subsample", in_channels=1)
    if norm == "batch-channel":
        use_batch_channel_norm(model, groups=GROUPS)
    elif norm == "group":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                replace(model, name, nn.GroupNorm(GROUPS, module.num_features))
    elif norm != "batch":
        raise PlanError(f"norm is {norm!r}; choose 'batch', 'group' or 'batch-channel'")
    return model


def contender(name: str, batch: int) -> Contender:
    """A row at a batch: as many images as the recipe's."""
    recipe = TrainingRecipe.load(RECIPE)
    norm, standardised = ROWS[name]
    steps = (recipe.steps or 0) * recipe.batch // batch
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, options={"norm": norm}),
        prepare=recipe.prepare if standardised else None,
        batch=batch,
        steps=steps,
        checkpoint_every=steps,
    )
    return Contender(name, recipe, [rate * batch for rate in RATES])


def conclusions(found: Mapping[tuple[str, int], Row]) -> list[str]:
    """What the numbers say of the claims."""
    pairs = (("GN + WS", "GN"), ("BCN + WS", "GN + WS"), ("BCN + WS", "GN"), ("GN", "BN"))
    lines = [
        f"Batch {batch}, {one} against {other}: {verdict(found[one, batch].accuracy, found[other, batch].accuracy)}."
        for batch in SMALL
        for one, other in pairs
    ]
    large = found["BN", LARGE].accuracy
    return lines + [
        f"{name} at {batch} against BN at {LARGE}: {verdict(found[name, batch].accuracy, large)}."
        for batch in SMALL
        for name in ROWS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "weight-standardization.md", __doc__, arguments)
    cells = [*product(ROWS, SMALL), ("BN", LARGE)]
    found = {cell: measure(contender(*cell), options.seeds, options.runs) for cell in cells}
    recipe = contender("BN", SMALL[0]).recipe
    by_row = {f"{name}, batch {batch}": row for (name, batch), row in found.items()}
    values: dict[str, list[Any]] = {
        name: [f"{row.rate:.2g}", accuracy_cell(row), loss_cell(row)] for name, row in by_row.items()
    }
    samples = (recipe.steps or 0) * recipe.batch
    write_results(
        options.out,
        title="Weight standardization and batch-channel norm: batches of a few images (arXiv 1903.10520)",
        claim="with group norm and standardised filters a network trains at one image a batch as well as with "
        "large-batch batch norm; batch-channel norm, which adds batch information by running estimates, does better.",
        tables=[
            Table(
                "Test accuracy in percent, training loss at the end",
                ["norm and batch", "learning rate", "accuracy", "loss"],
                values,
            ),
            rates_table(by_row),
        ],
        command=COMMAND,
        seeds=options.seeds,
        data=f"Fashion-MNIST at 14 x 14 pixels, the first {recipe.data.options['samples']:,} training images "
        f"({recipe.data.validation:,} of them for the learning rate), all test images. Residual network of 6 layers, "
        f"width {WIDTH}, {GROUPS} groups; {samples:,} images seen, SGD with momentum 0.9, cosine. BCN in its "
        "micro-batch form, estimates of rate 0.1.",
        conclusion_lines=[*conclusions(found), *at_the_edge(by_row)],
    )
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
