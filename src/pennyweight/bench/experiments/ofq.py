"""OFQ on a small vision transformer at two bits: StatsQ, confidence-guided annealing and QKR against learned steps.

    python -m pennyweight.bench.experiments.ofq        (about a quarter of an hour on one core)

For each seed a real-valued transformer is trained on Fashion-MNIST; every arm starts from it and trains for the same
steps, with the weights and inputs of all linear layers of its blocks at two bits (inputs by LSQ with shifts in every
arm, products of activations real). The learning rate, of one grid for all, is the one of the best accuracy on images
held out of the training set, for the first seed. It falls as a cosine to a floor; in the last fifth it stays there, and
that is where annealing acts in the arms that have it, and where oscillation is measured in all:

    oscillation    a weight's code moves back where it came from, per weight and step     (training/diagnostics.py)
    near           share of weights within 0.05 steps of a boundary between two codes, when training ends

Paper: Oscillation-free Quantization for Low-bit Vision Transformers, arXiv 2302.02210; it trains 330 epochs of ImageNet
under a teacher, with the attention's activations at two bits, too. Data: PENNYWEIGHT_DATA, default ../shared/data
beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.quantised import QuantisedLayer, last_transform, weight_chain
from ...models.vision_transformer import VisionTransformer
from ...training.diagnostics import Diagnostics, totals
from ...training.hooks import attach, hooks_of
from ...training.prepare import prepare
from ...training.schedule import Schedule
from ..results import Table, write_results
from .adaquant import fashion_mnist

REPOSITORY = Path(__file__).parents[4]
COMMAND = "python -m pennyweight.bench.experiments.ofq"
TRAIN, VALIDATION, TEST = 10_000, 1_000, 3_000
REAL_STEPS, STEPS, BATCH = 1000, 300, 32
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
REAL_RATE, DECAY, FLOOR, LAST = 2e-3, 0.05, 0.02, 0.8
BAND, NEAR = 0.005, 0.05
_LSQ, _STATSQ = {"method": "lsq", "bits": 2}, {"method": "statsq", "bits": 2}
_INPUT = {"method": "lsq", "bits": 2, "shift": True}
_CGA = {"hook": {"method": "cga", "band": BAND, "start": LAST}}
_QKR = {"attention": {"method": "query-key", "weight_quantizer": _STATSQ, "input_quantizer": _INPUT}}
#: Arm -> the rule for the transformer's blocks, beside their inputs.
ARMS: dict[str, Mapping[str, Any]] = {
    "LSQ": {"weight": _LSQ},
    "StatsQ": {"weight": _STATSQ},
    "StatsQ + CGA": {"weight": _STATSQ, **_CGA},
    "StatsQ + QKR": {"weight": _STATSQ, **_QKR},
    "StatsQ + CGA + QKR": {"weight": _STATSQ, **_CGA, **_QKR},
}
BASELINE, FULL = "LSQ", "StatsQ + CGA + QKR"


class Data(NamedTuple):
    """Images [n, 1, 28, 28] and labels [n]."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Run(NamedTuple):
    """Accuracies in percent; oscillations and flips a weight and step over the last fifth; share near a boundary."""

    validation: float
    test: float
    oscillation: float
    flips: float
    near: float


def load_images() -> Data:
    images, labels = fashion_mnist("train", TRAIN + VALIDATION)
    return Data((images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:]), fashion_mnist("t10k", TEST))


def transformer() -> VisionTransformer:
    """Two heads, so that query and key as one matrix have as many weights as apart."""
    return VisionTransformer(10, image_size=28, patch_size=7, features=48, depth=3, heads=2, in_channels=1)


def train(model: nn.Module, data: Data, rate: float, steps: int, seed: int) -> dict[str, float | None]:
    """AdamW; the rate falls as a cosine until `LAST` of the steps. Returns what oscillates from there on."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=rate,
    )
    attach(optimizer, hooks_of(model))
    schedule, watching = Schedule(model, steps), Diagnostics(model)
    images, labels = data.train
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(images), generator=draw) for _ in range(-(-steps * BATCH // len(images)))])
    model.train()
    for step, rows in enumerate(order[: steps * BATCH].split(BATCH)):
        share = min(1.0, step / steps / LAST)
        for group in optimizer.param_groups:
            group["lr"] = rate * (FLOOR + (1 - FLOOR) * (0.5 + 0.5 * math.cos(math.pi * share)))
        if step >= LAST * steps:
            watching.watch(updated=True)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = totals(watching.report({}, histograms=False))
    watching.close()
    model.eval()
    return found


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    right = [model(part).argmax(1) == wanted for part, wanted in zip(images.split(500), labels.split(500))]
    return 100 * float(torch.cat(right).double().mean())


@torch.no_grad()
def share_near_boundaries(model: nn.Module) -> float:
    """Of all quantised weights."""
    near = count = 0
    for layer in model.modules():
        if isinstance(layer, QuantisedLayer) and (chain := weight_chain(layer)) is not None:
            transform, weight = last_transform(chain)
            distance = transform.boundary_distance(weight)
            near, count = near + int((distance <= NEAR).sum()), count + distance.numel()
    return near / count


def run(arm: str, start: nn.Module, rate: float, data: Data, steps: int, seed: int) -> Run:
    """One arm from a trained real-valued model, which stays as it is."""
    model = copy.deepcopy(start)
    prepare(model, {"rules": [{"match": "blocks.*", "input": _INPUT, **ARMS[arm]}]}, data=data.train[0][:256])
    found = train(model, data, rate, steps, seed)
    return Run(
        accuracy(model, *data.validation),
        accuracy(model, *data.test),
        found["oscillation_rate"] or 0.0,
        found["flip_rate"] or 0.0,
        share_near_boundaries(model),
    )


def conclusions(found: Mapping[str, Sequence[Run]]) -> list[str]:
    """What the numbers say of the claim: less oscillation, and better than LSQ at two bits."""

    def mean(arm: str, quantity: str) -> float:
        return fmean(getattr(one, quantity) for one in found[arm])

    lines = []
    for arm in list(ARMS)[1:]:
        gain = mean(arm, "test") - mean(BASELINE, "test")
        wins = sum(a.test > b.test for a, b in zip(found[arm], found[BASELINE]))
        ratio = mean(arm, "oscillation") / max(mean(BASELINE, "oscillation"), 1e-12)
        lines.append(
            f"{arm}: {gain:+.1f} points against LSQ (higher in {wins} of {len(found[arm])} seeds), {ratio:.2f} times "
            "its oscillation."
        )
    for without, with_it in (("StatsQ", "StatsQ + CGA"), ("StatsQ + QKR", FULL)):
        before, after = mean(without, "oscillation"), mean(with_it, "oscillation")
        lines.append(
            f"Annealing by confidence {'reduces' if after < before else 'does not reduce'} the oscillation of "
            f"{without}: {1e6 * before:.0f} to {1e6 * after:.0f} per million weights and steps, accuracy "
            f"{mean(with_it, 'test') - mean(without, 'test'):+.1f} points."
        )
    holds = mean(FULL, "test") > mean(BASELINE, "test") and mean(FULL, "oscillation") < mean(BASELINE, "oscillation")
    lines.append(f"The claim, less oscillation and higher accuracy than LSQ, {'shows' if holds else 'does not show'}.")
    return lines


def at_equal_rates(grid: Mapping[str, Mapping[float, Run]]) -> list[str]:
    """The oscillation of the whole method and of the baseline where both had the same learning rate: a lower rate alone
    oscillates less."""
    pairs = [(grid[FULL][rate].oscillation, one.oscillation) for rate, one in grid[BASELINE].items()]
    fewer = sum(full < baseline for full, baseline in pairs)
    return [f"At equal learning rates {FULL} oscillates less than LSQ at {fewer} of {len(pairs)} (first seed)."]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results" / "ofq.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, data = list(range(options.seeds)), load_images()
    starts, reals = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        starts.append(transformer())
        train(starts[-1], data, REAL_RATE, max(1, REAL_STEPS * options.steps // STEPS), seed)
        reals.append(accuracy(starts[-1], *data.test))
    rates: dict[str, float] = {}
    found: dict[str, list[Run]] = {}
    grid: dict[str, dict[float, Run]] = {}
    for arm in ARMS:
        tried = {rate: run(arm, starts[0], rate, data, options.steps, seeds[0]) for rate in RATES}
        grid[arm] = tried
        rates[arm] = max(tried, key=lambda rate: tried[rate].validation)
        found[arm] = [tried[rates[arm]]]
        found[arm] += [run(arm, starts[seed], rates[arm], data, options.steps, seed) for seed in seeds[1:]]
        by_rate = {rate: round(one.validation, 2) for rate, one in tried.items()}
        print(f"{arm}: validation {by_rate}, {found[arm]}", file=sys.stderr, flush=True)
    rows: dict[str, list[Any]] = {"full precision": [f"{REAL_RATE:g}", reals, "", "", ""]}
    for arm, runs in found.items():
        rows[arm] = [
            f"{rates[arm]:g}",
            [one.test for one in runs],
            [1e6 * one.oscillation for one in runs],
            [1e6 * one.flips for one in runs],
            [100 * one.near for one in runs],
        ]
    write_results(
        options.out,
        title="OFQ: two bits without oscillation on a small vision transformer (arXiv 2302.02210)",
        claim="a statistical scale, annealing that freezes the weights whose code is certain, and query and key "
        "quantised as one matrix train two-bit transformers better than learned steps, which oscillate.",
        tables=[
            Table(
                "Weights and inputs of the blocks' linear layers at two bits. Oscillations and flips per million "
                "weights and steps, over the last fifth of the training; boundaries in steps of the grid",
                [
                    "arm",
                    "learning rate",
                    "test accuracy, %",
                    "oscillations",
                    "flips",
                    f"within {NEAR} of a boundary, %",
                ],
                rows,
            ),
            Table(
                "First seed by learning rate: validation accuracy in percent / oscillations per million",
                ["arm", *(f"{rate:g}" for rate in RATES)],
                {
                    arm: [f"{one.validation:.1f} / {1e6 * one.oscillation:.0f}" for one in tried.values()]
                    for arm, tried in grid.items()
                },
            ),
        ],
        command=COMMAND,
        seeds=seeds,
        data=f"Fashion-MNIST: {TRAIN:,} training images, {VALIDATION:,} others for the learning rate ({RATES}, first "
        f"seed), first {TEST:,} test images. Transformer of 3 blocks, 48 features, 2 heads, 17 tokens, patches and "
        f"head real; {REAL_STEPS} real-valued steps, then {options.steps} of each arm, batch {BATCH}, AdamW with decay "
        f"{DECAY}, floor {FLOOR} of the rate, annealing's band {BAND}.",
        conclusion_lines=[*conclusions(found), *at_equal_rates(grid)],
    )


if __name__ == "__main__":
    main()
