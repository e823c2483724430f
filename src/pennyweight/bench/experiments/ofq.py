"""OFQ on a small vision transformer at two bits: StatsQ, confidence-guided annealing and QKR against learned steps.

    python -m pennyweight.bench.experiments.ofq        (about half an hour on one core)

For each seed a real-valued transformer is trained on Fashion-MNIST; every arm starts from it and trains for the same
steps, with the weights and inputs of all linear layers of its blocks at two bits (inputs by LSQ with shifts in every
arm, products of activations real). The learning rate falls as a cosine to a floor; in the last eleventh of the steps,
30 of 330 epochs as published, it stays there. Annealing is a matter of that phase alone: the arms with and without it
are one training up to there, and differ by it and nothing else. In the phase are measured, in all arms:

    oscillation    a weight's code moves back where it came from, per weight and step     (training/diagnostics.py)
    near           share of weights within 0.05 steps of a boundary between two codes, when training ends

The learning rate of a training is the one of the best accuracy on images held out of the training set, for the first
seed, where it ends without annealing; all start from the same rates (bench/experiments/rates.py).

Paper: Oscillation-free Quantization for Low-bit Vision Transformers, arXiv 2302.02210; it trains 330 epochs of ImageNet
under a teacher, with the attention's activations at two bits, too. Data: PENNYWEIGHT_DATA, default ../shared/data
beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
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
from .command_line import REPOSITORY
from .rates import at_the_edge, best_rate, tried_rates

COMMAND = "python -m pennyweight.bench.experiments.ofq"
TRAIN, VALIDATION, TEST = 10_000, 2_000, 10_000
REAL_STEPS, STEPS, BATCH = 1000, 1000, 32
RATES, LADDER = (3e-4, 1e-3, 3e-3), (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
REAL_RATE, DECAY, FLOOR, LAST = 2e-3, 0.05, 0.02, 10 / 11
BAND, NEAR = 0.005, 0.05
_LSQ, _STATSQ = {"method": "lsq", "bits": 2}, {"method": "statsq", "bits": 2}
_INPUT = {"method": "lsq", "bits": 2, "shift": True}
_CGA = {"hook": {"method": "cga", "band": BAND, "start": LAST}}
_QKR = {"attention": {"method": "query-key", "weight_quantizer": _STATSQ, "input_quantizer": _INPUT}}
REAL, BASELINE, FULL = "full precision", "LSQ", "StatsQ + CGA + QKR"
#: Training -> the rule for the transformer's blocks, beside their inputs; None leaves it real.
TRAININGS: dict[str, Mapping[str, Any] | None] = {
    REAL: None,
    BASELINE: {"weight": _LSQ},
    "StatsQ": {"weight": _STATSQ, **_CGA},
    "StatsQ + QKR": {"weight": _STATSQ, **_CGA, **_QKR},
}
#: Training -> the arm that it becomes if its last phase is annealed.
ANNEALED = {"StatsQ": "StatsQ + CGA", "StatsQ + QKR": FULL}


class Data(NamedTuple):
    """Images [n, 1, 28, 28] and labels [n]."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Run(NamedTuple):
    """Accuracies in percent; oscillations and flips a weight and step in the last phase; share near a boundary at its
    end. Of quantised weights: 0 without any."""

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


class Training:
    """AdamW on a model for so many steps, which may be taken in parts. Its deepcopy goes on as it would itself."""

    def __init__(self, model: nn.Module, rate: float, steps: int, seed: int) -> None:
        self.model, self.rate, self.steps, self.taken = model, rate, steps, 0
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
                {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=rate,
        )
        self.schedule = Schedule(model, steps)
        draw = torch.Generator().manual_seed(seed)
        epochs = [torch.randperm(TRAIN, generator=draw) for _ in range(-(-steps * BATCH // TRAIN))]
        self.order = torch.cat(epochs)[: steps * BATCH].split(BATCH)

    @property
    def last_phase(self) -> int:
        """The step it begins with."""
        return math.ceil(LAST * self.steps)

    def go(self, images: Tensor, labels: Tensor, until: int) -> None:
        """Take the steps up to `until`."""
        self.model.train()
        for rows in self.order[self.taken : until]:
            share = min(1.0, self.taken / self.last_phase)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * (FLOOR + (1 - FLOOR) * (0.5 + 0.5 * math.cos(math.pi * share)))
            loss = F.cross_entropy(self.model(images[rows]), labels[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.taken += 1
        self.model.eval()

    def finish(self, data: Data, annealed: bool) -> Run:
        """The last phase, and what comes out."""
        if annealed:
            attach(self.optimizer, hooks_of(self.model))
        watching = Diagnostics(self.model)
        for step in range(self.taken, self.steps):
            watching.watch(updated=True)
            self.go(*data.train, until=step + 1)
        found = totals(watching.report({}, histograms=False))
        watching.close()
        return Run(
            accuracy(self.model, *data.validation),
            accuracy(self.model, *data.test),
            found["oscillation_rate"] or 0.0,
            found["flip_rate"] or 0.0,
            share_near_boundaries(self.model),
        )


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
    return near / max(count, 1)


def run(name: str, start: nn.Module, rate: float, data: Data, steps: int, seed: int) -> dict[str, Run]:
    """Arm -> what it came to, of one of `TRAININGS`, from a trained real-valued model, which stays as it is."""
    model, rule = copy.deepcopy(start), TRAININGS[name]
    if rule is not None:
        prepare(model, {"rules": [{"match": "blocks.*", "input": _INPUT, **rule}]}, data=data.train[0][:256])
    training = Training(model, rate, steps, seed)
    training.go(*data.train, until=training.last_phase)
    found = {}
    if name in ANNEALED:
        found[ANNEALED[name]] = copy.deepcopy(training).finish(data, annealed=True)
    return {name: training.finish(data, annealed=False), **found}


def stored(path: Path, make: Callable[[], dict[str, Run]]) -> dict[str, Run]:
    """What `make` returned when it was called for that file first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({arm: one._asdict() for arm, one in make().items()}, indent=1), "utf-8")
        unfinished.replace(path)
    return {arm: Run(**values) for arm, values in json.loads(path.read_text(encoding="utf-8")).items()}


def conclusions(found: Mapping[str, Sequence[Run]]) -> list[str]:
    """What the numbers say of the claim: less oscillation, and better than LSQ at two bits."""

    def mean(arm: str, quantity: str) -> float:
        return fmean(getattr(one, quantity) for one in found[arm])

    lines = []
    for arm in found:
        if arm in (REAL, BASELINE):
            continue
        gain = mean(arm, "test") - mean(BASELINE, "test")
        wins = sum(a.test > b.test for a, b in zip(found[arm], found[BASELINE]))
        ratio = mean(arm, "oscillation") / max(mean(BASELINE, "oscillation"), 1e-12)
        lines.append(
            f"{arm}: {gain:+.1f} points against LSQ (higher in {wins} of {len(found[arm])} seeds), {ratio:.2f} times "
            "its oscillation."
        )
    for without, with_it in ANNEALED.items():
        before, after = mean(without, "oscillation"), mean(with_it, "oscillation")
        fewer = sum(a.oscillation < b.oscillation for a, b in zip(found[with_it], found[without]))
        lines.append(
            f"From the same weights at the same learning rate, annealing by confidence "
            f"{'reduces' if after < before else 'does not reduce'} the oscillation of {without}: {1e6 * before:.0f} to "
            f"{1e6 * after:.0f} per million weights and steps (fewer in {fewer} of {len(found[with_it])} seeds), "
            f"accuracy {mean(with_it, 'test') - mean(without, 'test'):+.1f} points."
        )
    gains = [a.test - b.test for a, b in zip(found[FULL], found[BASELINE])]
    accurate = fmean(gains) > 0 and all(gain > 0 for gain in gains)
    quiet = mean(FULL, "oscillation") < mean(BASELINE, "oscillation")
    lines.append(
        f"Of the claim against LSQ, less oscillation {'shows' if quiet else 'does not show'}, and higher accuracy "
        f"{'shows (in every seed)' if accurate else 'does not show (not in every seed)'}."
    )
    return lines


def at_equal_rates(grid: Mapping[str, Mapping[float, Mapping[str, Run]]]) -> list[str]:
    """The oscillation of the whole method and of the baseline where both had the same learning rate: a lower rate alone
    oscillates less."""
    whole = {rate: arms[FULL] for tried in grid.values() for rate, arms in tried.items() if FULL in arms}
    baseline = {rate: arms[BASELINE] for rate, arms in grid[BASELINE].items()}
    common = sorted(whole.keys() & baseline.keys())
    fewer = sum(whole[rate].oscillation < baseline[rate].oscillation for rate in common)
    return [f"At equal learning rates {FULL} oscillates less than LSQ at {fewer} of {len(common)} (first seed)."]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results" / "ofq.md")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "out" / "experiments" / "ofq", help="kept there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, data = list(range(options.seeds)), load_images()

    @cache
    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        training = Training(transformer(), REAL_RATE, max(1, REAL_STEPS * options.steps // STEPS), seed)
        training.go(*data.train, until=training.steps)
        return training.model

    def arms(name: str, rate: float, seed: int) -> dict[str, Run]:
        path = options.runs / f"{name.replace(' ', '')}-{options.steps}-{rate:g}-{seed}.json"
        found = stored(path, lambda: run(name, start(seed), rate, data, options.steps, seed))
        print(f"{name}, rate {rate:g}, seed {seed}: {found}", file=sys.stderr, flush=True)
        return found

    rates: dict[str, float] = {}
    found: dict[str, list[Run]] = {}
    grid: dict[str, dict[float, dict[str, Run]]] = {}
    for name in TRAININGS:

        def validation(tried: Mapping[str, Run], name: str = name) -> float:
            return tried[name].validation

        grid[name] = tried_rates(partial(arms, name, seed=seeds[0]), validation, LADDER, RATES)
        best = best_rate(grid[name], validation)
        runs = [grid[name][best], *(arms(name, best, seed) for seed in seeds[1:])]
        for arm in runs[0]:
            rates[arm], found[arm] = best, [one[arm] for one in runs]
    write_page(options, found, rates, grid)


def write_page(
    options: argparse.Namespace,
    found: Mapping[str, Sequence[Run]],
    rates: Mapping[str, float],
    grid: Mapping[str, Mapping[float, Mapping[str, Run]]],
) -> None:
    """found, rates: of every arm. grid: training -> learning rate -> arm -> run with the first seed."""
    rows: dict[str, list[Any]] = {}
    for arm, runs in found.items():
        moves = [
            [1e6 * one.oscillation for one in runs],
            [1e6 * one.flips for one in runs],
            [100 * one.near for one in runs],
        ]
        rows[arm] = [f"{rates[arm]:g}", [one.test for one in runs], *(["", "", ""] if arm == REAL else moves)]
    columns = sorted({rate for tried in grid.values() for rate in tried})
    tried: dict[str, list[Any]] = {}
    for by_rate in grid.values():
        for arm in next(iter(by_rate.values())):
            tried[arm] = [
                f"{by_rate[rate][arm].validation:.1f} / {1e6 * by_rate[rate][arm].oscillation:.0f}"
                if rate in by_rate
                else ""
                for rate in columns
            ]
    edges = [
        f"The learning rate of {name}, {rates[name]:g}, is at the edge of those tried."
        for name, by_rate in grid.items()
        if at_the_edge(rates[name], list(by_rate))
    ]
    write_results(
        options.out,
        title="OFQ: two bits without oscillation on a small vision transformer (arXiv 2302.02210)",
        claim="a statistical scale, annealing that freezes the weights whose code is certain, and query and key "
        "quantised as one matrix train two-bit transformers better than learned steps, which oscillate.",
        tables=[
            Table(
                "Weights and inputs of the blocks' linear layers at two bits. Oscillations and flips per million "
                "weights and steps, over the last eleventh of the training; boundaries in steps of the grid",
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
                ["arm", *(f"{rate:g}" for rate in columns)],
                tried,
            ),
        ],
        command=COMMAND,
        seeds=list(range(options.seeds)),
        data=f"Fashion-MNIST: {TRAIN:,} training images, {VALIDATION:,} others for the learning rate (first seed), "
        f"{TEST:,} test images. Transformer of 3 blocks, 48 features, 2 heads, 17 tokens, patches and head real; "
        f"{REAL_STEPS:,} real-valued steps at {REAL_RATE:g}, then {options.steps:,} of each arm (full precision, too), "
        f"batch {BATCH}, AdamW with decay {DECAY}, floor {FLOOR} of the rate, annealing's band {BAND}.",
        conclusion_lines=[*conclusions(found), *at_equal_rates(grid), *edges],
    )


if __name__ == "__main__":
    main()
