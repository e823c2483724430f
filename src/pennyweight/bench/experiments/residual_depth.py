"""Residual scaling at depth 20 to 200 without norms, against no scaling, batch norm and SkipInit.

    python -m pennyweight.bench.experiments.residual_depth        (about four minutes on one core)

One residual network of fully connected layers on Fashion-MNIST, z <- z + branch(z) with branches of two layers, at
three depths. Every row is that network; rows without norms are made of the one with batch norms by one call of
`scale_residuals`. What is trained is recipes/residual-depth.yaml, with another depth, scale and learning rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.residual_scaling import Scale, residual_scale, scale_residuals
from ...training.randomness import derived_seed
from ...training.settings import TrainingRecipe
from ..results import Cell, Table, write_results
from .command_line import REPOSITORY, arguments_of
from .recipe_runs import Contender
from .supervised import (
    Row,
    accuracy_cell,
    at_the_edge,
    loss_cell,
    measure,
    rates_table,
    verdict,
)

COMMAND = "python -m pennyweight.bench.experiments.residual_depth"
RECIPE = REPOSITORY / "recipes" / "residual-depth.yaml"
RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.25)
#: Residual sums of the network; two layers each.
DEPTHS = (10, 30, 100)
WIDTH = 48
SQRT, INVERSE, NONE, SKIP, NORM = "1/sqrt(n)", "1/n", "no scaling", "SkipInit", "batch norm"
#: Row -> options of the model.
ROWS: dict[str, dict[str, Any]] = {
    NORM: {"scale": None},
    NONE: {"scale": 1.0},
    SKIP: {"scale": 0.0, "learn": True},
    INVERSE: {"scale": "inv"},
    SQRT: {"scale": "inv_sqrt"},
}


class ResidualBlock(nn.Module):
    """z [samples, width] -> z + branch(z), the branch of two layers with batch norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width)
        )

    def forward(self, z: Tensor) -> Tensor:
        return z + self.branch(z)


def residual_mlp(blocks: int, scale: Scale | None = "inv_sqrt", learn: bool = False) -> nn.Module:
    """Images [samples, 1, 14, 14] -> logits of 10 classes. scale, learn: of `scale_residuals`; None keeps the norms."""
    body = nn.Sequential(*(ResidualBlock(WIDTH) for _ in range(blocks)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(14 * 14, WIDTH), body, nn.Linear(WIDTH, 10))
    return model if scale is None else scale_residuals(model, scale, learn=learn)


@torch.no_grad()
def growth(blocks: int, options: Mapping[str, Any], seed: int) -> float:
    """Root mean square of z behind the last block over that before the first, of a new network in training mode."""
    torch.manual_seed(derived_seed(seed, "model"))
    model: Any = residual_mlp(blocks, **options)
    z = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(seed))
    return float((model[2](z).double().square().mean() / z.double().square().mean()).sqrt())


Found = Mapping[int, Mapping[str, Row]]


def conclusions(found: Found) -> list[str]:
    """What the numbers say of the claims: no scaling fails with depth, scaled ones train, 1/sqrt(n) above 1/n."""

    def depths(of: Sequence[int]) -> str:
        return ", ".join(f"{2 * n} layers" for n in of) or "no depth"

    lines = []
    for name in ROWS:
        lost = [n for n, rows in found.items() if rows[name].diverged]
        if lost:
            lines.append(f"{name}: runs at the chosen rate, the best that there is, diverged at {depths(lost)}.")
    trained = [name for name in ROWS if not any(rows[name].diverged for rows in found.values())]
    lines.append(f"At all depths these trained with every seed: {', '.join(trained)}.")
    for n, rows in found.items():
        for other in (INVERSE, SKIP, NORM, NONE):
            text = verdict(rows[SQRT].accuracy, rows[other].accuracy)
            lines.append(f"{2 * n} layers, {SQRT} against {other}: {text}.")
    shallow, deep = min(found), max(found)
    for name in (SQRT, INVERSE, SKIP, NORM):
        change = fmean(found[deep][name].accuracy) - fmean(found[shallow][name].accuracy)
        lines.append(f"{name}: {change:+.1f} points from {2 * shallow} to {2 * deep} layers.")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "residual-depth.md", __doc__, arguments)
    recipe = TrainingRecipe.load(RECIPE)
    found: dict[int, dict[str, Row]] = {}
    for blocks in DEPTHS:
        found[blocks] = {}
        for name, choice in ROWS.items():
            model = dataclasses.replace(recipe.model, options={"blocks": blocks, **choice})
            contender = Contender(name, dataclasses.replace(recipe, model=model), RATES)
            found[blocks][name] = measure(contender, options.seeds, options.runs)
    by_row = {f"{name}, {2 * n} layers": row for n, rows in found.items() for name, row in rows.items()}
    columns = [f"{2 * n} layers" for n in DEPTHS]

    def table(caption: str, cell: Any, digits: int = 1) -> Table:
        rows: dict[str, list[Cell]] = {name: [cell(found[n][name]) for n in DEPTHS] for name in ROWS}
        return Table(caption, ["branches", *columns], rows, digits)

    sizes = {
        name: [f"{fmean(growth(n, choice, seed) for seed in options.seeds):.3g}" for n in DEPTHS]
        for name, choice in ROWS.items()
    }
    write_results(
        options.out,
        title="Residual scaling: deep networks without norms (arXiv 2510.03470)",
        claim="without norms and scaling the output of a residual network grows exponentially with depth, and it does "
        "not train; with branches times 1/sqrt(n) or 1/n it trains at any depth, the former to a higher accuracy; "
        "batch norm is not beaten.",
        tables=[
            table("Test accuracy in percent", accuracy_cell),
            table("Training loss over the last 10 steps", loss_cell, digits=3),
            Table("Growth of the root mean square over all blocks, before training", ["branches", *columns], sizes),
            rates_table(by_row),
        ],
        command=COMMAND,
        seeds=options.seeds,
        data=f"Fashion-MNIST at 14 x 14 pixels: {recipe.data.options['samples']:,} training images "
        f"({recipe.data.validation:,} of them for the learning rate), all test images. Branches Linear, ReLU, Linear, "
        f"of width {WIDTH}; 1/sqrt(n) is {residual_scale(DEPTHS[0]):.2f} to {residual_scale(DEPTHS[-1]):.2f}. "
        f"{recipe.steps} steps of {recipe.batch} images, SGD with momentum 0.9, cosine. SkipInit: scales learned "
        "from 0.",
        conclusion_lines=[*conclusions(found), *at_the_edge(by_row)],
    )
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
