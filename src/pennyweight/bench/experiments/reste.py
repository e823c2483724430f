"""ReSTE against the straight-through estimator: the same binary ResNet-20 on small CIFAR-10 images, the same steps.

    python -m pennyweight.bench.experiments.reste        (about half an hour on one core; goes on where it stopped)

How ReSTE is trained is recipes/reste.yaml; the baselines differ in `prepare` alone: `bnn` (signs, gradient where
|x| <= 1) and none (full precision). Data: PENNYWEIGHT_DATA, default ../shared/data beside the repository.
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
    ratio_of,
    tables,
)

COMMAND = "python -m pennyweight.bench.experiments.reste"
RECIPE = REPOSITORY / "recipes" / "reste.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(COMMAND, "reste.md", __doc__, arguments)
    rows = contenders(RECIPE, "ReSTE", (1e-2, 3e-2), BASELINES)
    found = {row.name: measure(row, options.seeds, options.runs) for row in rows}
    error, instability = (
        ratio_of(found["ReSTE"].error, found["STE"].error),
        ratio_of(found["ReSTE"].instability, found["STE"].instability),
    )
    write_results(
        options.out,
        title="ReSTE: the gradient of a power function for signs",
        claim="a gradient that goes from the identity towards the sign in the course of training has a smaller "
        "estimating error than the straight-through estimator at the price of less stable gradients, and trains binary "
        "networks to a higher accuracy: 86.8 against 84.4 percent for ResNet-20 after 1000 epochs of CIFAR-10 "
        "(2308.06689).",
        tables=tables(found),
        command=COMMAND,
        seeds=options.seeds,
        data=data_of(rows[-1].recipe),
        conclusion_lines=[
            compared(found, "ReSTE", "STE"),
            compared(found, "STE", "full precision"),
            f"ReSTE's estimating error is {error:.2f} times that of STE: {'smaller, as' if error < 1 else 'not as'} "
            "the paper has it. Each error is that of the method's own surrogate, with latent weights trained by it.",
            f"Its gradient instability is {instability:.2g} times that of STE; the paper has it grow as the error "
            "falls. ReSTE's layers have a scale and STE's have none, which enters here.",
            *at_the_edge(found),
        ],
    )
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
