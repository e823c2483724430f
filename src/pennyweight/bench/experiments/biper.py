"""BiPer against the straight-through estimator: the same network, the same steps.

    python -m pennyweight.bench.experiments.biper        (about half an hour on one core; goes on where it stopped)

How BiPer is trained is recipes/biper.yaml. The baselines have one stage of as many steps and differ in `prepare`
otherwise: `bnn` (signs, gradient where |x| <= 1), `bi-real` (whose gradient BiPer's activations have, too) and none
(full precision).

Of omega and the size of the latent weights only the product matters. At omega = 20 the initial phases deviate by 1.2 to
2.4 in the paper's networks, and by up to 3.3 in ones as narrow as here. Another row halves that. Data:
PENNYWEIGHT_DATA, default ../shared/data beside the repository.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from ...training.presets import PRESETS
from ...training.settings import TrainingRecipe
from .binary_training import write_page

OMEGA = 10.0


def low_frequency(recipe: TrainingRecipe) -> TrainingRecipe:
    rules = copy.deepcopy(PRESETS["biper"])
    rules[0]["weight"]["estimator"] = {"name": "biper", "omega": OMEGA}
    return dataclasses.replace(recipe, prepare={"rules": rules})


VARIANTS = {f"BiPer, omega {OMEGA:g}": low_frequency}


def main(arguments: Sequence[str] | None = None) -> None:
    write_page(
        "biper",
        "BiPer",
        title="BiPer: weights as the sign of a sine",
        claim="a square wave of the latent weight, trained as a sine, leaves no weight far from a flip and gains up to "
        "a point over earlier binary networks: 87.0 percent for ResNet-20 on CIFAR-10 after 900 epochs (2404.01278).",
        doc=__doc__,
        own_lines=lambda found: [],
        variants=VARIANTS,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
