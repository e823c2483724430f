"""Published methods as recipes: which parts each of them is made of. Data only; a new method is a new entry.

First and last layer stay real by themselves. Convolutions of shortcuts, which most papers keep real, are the model's
to name: add a rule with `exclude: true`. RPReLU of ReActNet belongs to the model, too (layers/rprelu.py).

    xnor-net    a scale a sample, as BiBench has it (the paper's is a map of box-filtered means); BiBench's linear
                layers also centre their weights: pre: centred
    dorefa      one bit, -1 and +1 with a scale an output, as BiBench has it; dorefa-2 is the paper's own at two bits
    recu, biper activations divided by their deviation in training; learned scales start uniform in [0, 1) as released
    biper       its first stage (sine weights) ends at `start` of the progress: as released, two thirds of 900 epochs
    lsq, ofq    two bits; signed inputs and those behind a softmax as the data says. OFQ puts its query-key attention in
                the place of a SelfAttention (models/attention.py), and anneals by confidence in the last eleventh of
                the training (30 of 330 epochs) if the hooks of the layers are attached (training/hooks.py)
    denoise-affine    one bit on both sides
    two-stage   activations become binary first, weights at half of the training (ReActNet's two steps, PokeBNN)

`MODEL_PRESETS` are for one architecture of models/ each.

    pokebnn     the bits of models.pokebnn.precision; weights of the blocks are real for the first 50 of 800 epochs.
                Needs data: inputs of 4 and 8 bits have a bound a channel. The paper takes it from running statistics at
                6 % of the training, here it is `prepare`'s data; all these inputs come from a norm but those between
                the two layers of a gate, so `calibrate` again there if the gates have moved far
"""

from __future__ import annotations

import math
from typing import Any

_LAYERS = ["Linear", "Conv1d", "Conv2d"]


def _everywhere(**rule: Any) -> list[dict[str, Any]]:
    return [{"match": _LAYERS, **rule}]


def _binary(estimator: str | dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"method": "binary", "estimator": estimator, **options}


def _sign(estimator: str | dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"method": "sign", "estimator": estimator, **options}


_LSQ_SHIFTED = {"method": "lsq", "bits": 2, "shift": True}

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
    "ofq": [
        {
            "match": [*_LAYERS, "SelfAttention"],
            "weight": {"method": "statsq", "bits": 2},
            "input": _LSQ_SHIFTED,
            "hook": {"method": "cga", "band": 0.005, "start": 10 / 11},
            "attention": {
                "method": "query-key",
                "weight_quantizer": {"method": "statsq", "bits": 2},
                "input_quantizer": _LSQ_SHIFTED,
                "product_quantizer": _LSQ_SHIFTED,
                "attention_quantizer": {"method": "lsq", "bits": 2, "signed": False},
                "value_quantizer": {"method": "lsq", "bits": 2, "per": "channel", "shift": True},
            },
        }
    ],
    "denoise-affine": _everywhere(
        weight={"method": "denoise-affine", "bits": 1}, input={"method": "denoise-affine", "bits": 1}
    ),
    "two-stage": _everywhere(weight=_binary("ste", start=0.5), input={"method": "rsign"}),
}


def _poke_bits(match: list[str], bits: int, signed: bool = True) -> dict[str, Any]:
    entry = {"method": "pokebnn", "bits": bits}
    return {"match": match, "weight": entry, "input": {**entry, "signed": signed}}


MODEL_PRESETS: dict[str, list[dict[str, Any]]] = {
    "pokebnn": [
        {
            "match": "*.convolution",
            "weight": _binary({"name": "pokebnn", "bound": "channel"}, scale="half-maximum", start=1 / 16),
            "input": _sign({"name": "pokebnn", "bound": 3.0}),
        },
        _poke_bits(["*.gate.squeeze"], 4),
        _poke_bits(["*.gate.excite"], 4, signed=False),
        _poke_bits(["stem.patches", "stem.grouped", "head"], 8),
    ],
}
