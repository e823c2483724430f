"""Published methods as recipes: which parts each of them is made of. Data only; a new method is a new entry.

First and last layer stay real by themselves. Convolutions of shortcuts, which most papers keep real, are the model's
to name: add a rule with `exclude: true`. RPReLU of ReActNet belongs to the model, too (layers/rprelu.py).

    xnor-net    a scale a sample, as BiBench has it (the paper's is a map of box-filtered means); BiBench's linear
                layers also centre their weights: pre: centred
    dorefa      one bit, -1 and +1 with a scale an output, as BiBench has it; dorefa-2 is the paper's own at two bits
    recu, biper activations divided by their deviation in training; learned scales start uniform in [0, 1) as released
    biper       its first stage (sine weights) ends at `start` of the progress: as released, two thirds of 900 epochs
    lsq, ofq    two bits. Of OFQ the quantisers: annealing by confidence (optim/) acts around the step, the query-key
                attention (layers/) is part of the model
    denoise-affine    one bit on both sides
    two-stage   activations become binary first, weights at half of the training (ReActNet's two steps, PokeBNN)
"""

from __future__ import annotations

import math
from typing import Any

_LAYERS = ["Linear", "Conv1d", "Conv2d"]


def _everywhere(**rule: Any) -> list[dict[str, Any]]:
    return [{"match": _LAYERS, **rule}]


def _binary(estimator: str, **options: Any) -> dict[str, Any]:
    return {"method": "binary", "estimator": estimator, **options}


def _sign(estimator: str, **options: Any) -> dict[str, Any]:
    return {"method": "sign", "estimator": estimator, **options}


PRESETS: dict[str, list[dict[str, Any]]] = {
    "bnn": _everywhere(weight=_binary("ste", scale="none"), input=_sign("ste")),
    "xnor-net": _everywhere(weight=_binary("ste"), input=_sign("ste", sample_scale=True)),
    "xnor++": _everywhere(
        weight=_binary("ste", scale="learned", init="ones"), input=_sign("ste"), output={"method": "spatial-scale"}
    ),
    "dorefa": _everywhere(weight=_binary("ste"), input=_sign("ste")),
    "dorefa-2": _everywhere(weight={"method": "dorefa", "bits": 2}, input={"method": "dorefa", "bits": 2}),
    "bi-real": _everywhere(weight=_binary("ste"), input=_sign("bi-real")),
    "reactnet": _everywhere(weight=_binary("ste"), input={"method": "rsign"}),
    "recu": _everywhere(
        weight=_binary("recu", pre="standardised", gain=2 * math.sqrt(2), scale="learned", init="uniform"),
        input=_sign("bi-real", standardise=True),
    ),
    "fda": _everywhere(weight={"method": "fda"}, input={"method": "fda"}),
    "reste": _everywhere(weight=_binary("reste", scale="layer", detached=False), input=_sign("reste")),
    "biper": _everywhere(
        weight=_binary("biper", scale="learned", init="uniform", start=2 / 3, before="approximation"),
        input=_sign("bi-real", standardise=True),
    ),
    "lsq": _everywhere(weight={"method": "lsq", "bits": 2}, input={"method": "lsq", "bits": 2}),
    "ofq": _everywhere(weight={"method": "statsq", "bits": 2}, input={"method": "lsq", "bits": 2, "shift": True}),
    "denoise-affine": _everywhere(
        weight={"method": "denoise-affine", "bits": 1}, input={"method": "denoise-affine", "bits": 1}
    ),
    "two-stage": _everywhere(weight=_binary("ste", start=0.5), input={"method": "rsign"}),
}
