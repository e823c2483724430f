"""BiPer against the straight-through estimator: the same binary ResNet-20 on small CIFAR-10 images, the same steps.

    python -m pennyweight.bench.experiments.biper        (about half an hour on one core; goes on where it stopped)

How BiPer is trained is recipes/biper.yaml, in two stages as published. The baselines have one stage of as many steps
and differ in `prepare` otherwise: `bnn` (signs, gradient where |x| <= 1), `bi-real` (the triangle as the gradient of
activations, which BiPer has, too: what the sine adds is seen against this) and none (full precision). A step of BiPer's
latent weight is a step of omega = 20 times that in phase: its grid of learning rates lies lower.
Data: PENNYWEIGHT_DATA, default ../shared/data beside the repository.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..results import write_results
from .cifar_training import (
    BASELINES,
    REPOSITORY,
    arguments_of,
    at_the_edge,
    compared,
    contenders,
    data_of,
    measure,
    tables,
)

COMMAND = "python -m pennyweight.bench.experiments.biper"
RECIPE = REPOSITORY / "recipes" / "biper.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "biper.md", __doc__, arguments)
    rows = contenders(RECIPE, "BiPer", (3e-3, 1e-2), BASELINES | {"Bi-Real": ("bi-real", (1e-2, 3e-2))})
    found = {row.name: measure(row, options.seeds, options.runs) for row in rows}
    write_results(
        options.out,
        title="BiPer: weights as the sign of a sine",
        claim="a square wave of the latent weight, trained as a sine, leaves no weight far from a flip and gains up to "
        "a point over earlier binary networks: 87.0 percent for ResNet-20 on CIFAR-10 after 900 epochs (2404.01278).",
        tables=tables(found),
        command=COMMAND,
        seeds=options.seeds,
        data=data_of(rows[-1].recipe),
        conclusion_lines=[
            compared(found, "BiPer", "STE"),
            compared(found, "BiPer", "Bi-Real"),
            compared(found, "STE", "full precision"),
            *at_the_edge(found),
        ],
    )
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
