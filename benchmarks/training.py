"""Training with binary and 4-bit layers beside brevitas: time of a step, bytes of the file, seconds of conversion.

    python benchmarks/training.py               # a quarter of an hour on one core; needs brevitas
    python benchmarks/training.py --rounds 3    # a look

Both sides train the same network from the same weights on the same images, all convolutions but the first quantised:

    W1A1    signs, gradient where the latent value is within 1: preset `bnn`; SignedBinaryWeightPerTensorConst and
            SignedBinaryActPerTensorConst with their constant scale at 1, which is the same function: both losses agree
    W4A4    one learned step a layer for weights and for inputs: method `lsq` twice; Int8WeightPerTensorFloat and
            Int8ActPerTensorFloat at 4 bits, both scales parameters

1. A step: forward, backward and optimizer (SGD with momentum). The ways of one network take turns; medians over the
   rounds, of processor time, which other processes change least. Goal: at most 1.0 times brevitas.
   brevitas looks for its inputs' scales by a percentile in the first 300 steps; that is cut to the one warm-up step.
2. The file: `pennyweight.convert` and `pennyweight.save`, all files needed to load it, against `torch.save` of
   brevitas' state dict. Goal: at least 20 times smaller at W1A1. The converted network must compute what the trained
   one did.
3. `pennyweight.convert` of the trained ResNet-18. Goal: under 5 seconds.
The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import copy
import importlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import pennyweight as pw
from common import Result, Row, Table, verdict
from pennyweight.models.resnet_cifar import resnet18_cifar, resnet20

#: name -> (factory, images of a batch)
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "ResNet-18, width 64": (resnet18_cifar, 32),
    "ResNet-20, width 16": (resnet20, 64),
}
RECIPES: dict[str, dict[str, Any]] = {
    "W1A1": {"preset": "bnn"},
    "W4A4": {
        "rules": [{"match": "Conv2d", "weight": {"method": "lsq", "bits": 4}, "input": {"method": "lsq", "bits": 4}}]
    },
}
MOST_TIME, LEAST_SMALLER, MOST_SECONDS = 1.0, 20.0, 5.0


def fresh(network: str) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return NETWORKS[network][0](activation="hardtanh")


def with_brevitas(model: nn.Module, recipe: str) -> nn.Module:
    """Every convolution but the first as brevitas' own, with the weights it had."""
    layers = importlib.import_module("brevitas.nn")
    weight, inputs = brevitas_quantisers(recipe)
    convolutions = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for name, old in convolutions[1:]:
        new = layers.QuantConv2d(
            old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False,
            weight_quant=weight, input_quant=inputs,
        )  # fmt: skip
        new.weight.data.copy_(old.weight.data)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def brevitas_quantisers(recipe: str) -> tuple[type, type]:
    """Of weights and of inputs."""
    quant = importlib.import_module("brevitas.quant")
    if recipe == "W1A1":
        same = {"scaling_const": 1.0}
        return (
            type("Weight", (quant.SignedBinaryWeightPerTensorConst,), same),
            type("Input", (quant.SignedBinaryActPerTensorConst,), same),
        )
    learned = importlib.import_module("brevitas.inject.enum").ScalingImplType.PARAMETER_FROM_STATS
    return (
        type("Weight", (quant.Int8WeightPerTensorFloat,), {"bit_width": 4, "scaling_impl_type": learned}),
        type("Input", (quant.Int8ActPerTensorFloat,), {"bit_width": 4, "collect_stats_steps": 1}),
    )


class Training:
    """One model that takes steps on one batch."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model.train(), images, labels
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(self) -> float:
        """The loss before it."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def measure(network: str, rounds: int) -> Row:
    """{"steps": way -> milliseconds, "bytes": way -> bytes, "convert": recipe -> seconds}"""
    batch = NETWORKS[network][1]
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32, generator=draw), torch.randint(10, (batch,), generator=draw)
    ways = {"full precision": Training(fresh(network), images, labels)}
    for recipe, rules in RECIPES.items():
        ours = pw.prepare(fresh(network), rules, data=[images])
        ways[f"pennyweight {recipe}"] = Training(ours, images, labels)
        ways[f"brevitas {recipe}"] = Training(with_brevitas(fresh(network), recipe), images, labels)
    losses = {name: way.step() for name, way in ways.items()}  # memory, threads and scales come with the first step
    if abs(losses["pennyweight W1A1"] - losses["brevitas W1A1"]) > 1e-4:
        raise SystemExit(f"the two W1A1 networks are not the same: their losses are {losses}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            watch = common.Stopwatch()
            way.step()
            times[name].append(watch.read()["processor_seconds"])
    row: Row = {
        "steps": {name: 1e3 * statistics.median(taken) for name, taken in times.items()},
        "bytes": {},
        "convert": {},
    }
    for recipe in RECIPES:
        trained = ways[f"pennyweight {recipe}"].model.eval()
        with torch.no_grad():
            expected = trained(images)
            watch = common.Stopwatch()
            small = pw.convert(copy.deepcopy(trained))
            row["convert"][recipe] = watch.read()["processor_seconds"]
            torch.testing.assert_close(small(images), expected, rtol=1e-4, atol=1e-4)
        with tempfile.TemporaryDirectory() as folder:
            row["bytes"][f"pennyweight {recipe}"] = common.save_and_measure(small, folder)
            path = Path(folder) / "brevitas.pt"
            torch.save(ways[f"brevitas {recipe}"].model.state_dict(), path)
            row["bytes"][f"brevitas {recipe}"] = path.stat().st_size
    return row


def result(rows: dict[str, Row], rounds: int) -> Result:
    steps, files, met = {}, {}, []
    for network, row in rows.items():
        full = row["steps"]["full precision"]
        for recipe in RECIPES:
            ours, theirs = (row["steps"][f"{side} {recipe}"] for side in ("pennyweight", "brevitas"))
            met.append(ours / theirs <= MOST_TIME)
            steps[f"{network}, {recipe}"] = [
                f"{full:.0f}", f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}", verdict(met[-1]),
            ]  # fmt: skip
            ours, theirs = (row["bytes"][f"{side} {recipe}"] for side in ("pennyweight", "brevitas"))
            wanted = LEAST_SMALLER if recipe == "W1A1" else None
            met += [] if wanted is None else [theirs / ours >= wanted]
            met.append(row["convert"][recipe] < MOST_SECONDS)
            files[f"{network}, {recipe}"] = [
                f"{ours:,}", f"{theirs:,}", f"{theirs / ours:.1f}", verdict(None if wanted is None else met[-2]),
                f"{row['convert'][recipe]:.2f}", verdict(met[-1]),
            ]  # fmt: skip
    ratios = [float(cells[3]) for cells in steps.values()]
    smaller = {name: float(cells[2]) for name, cells in files.items()}
    slowest = max(row["convert"][recipe] for row in rows.values() for recipe in RECIPES)
    return Result(
        title="Training beside brevitas",
        claim=f"a training step at most {MOST_TIME} times as long as brevitas', a W1A1 file at least "
        f"{LEAST_SMALLER:g} times smaller than its checkpoint, conversion in under {MOST_SECONDS:g} seconds",
        data=f"random images of 32 x 32; {torch.get_num_threads()} thread, {rounds} rounds after one that is not "
        f"counted; brevitas {version('brevitas')}",
        tables=[
            Table(
                "One training step, milliseconds of processor time, medians of interleaved runs",
                ["network", "full precision", "pennyweight", "brevitas", "pennyweight / brevitas", "at most 1.0"],
                steps,
            ),
            Table(
                "The finished file in bytes, and processor seconds of `pennyweight.convert`",
                ["network", "pennyweight", "brevitas", "times smaller", "at least 20 (W1A1)", "convert", "under 5"],
                files,
            ),
        ],
        conclusions=[
            f"A step takes {min(ratios):.2f} to {max(ratios):.2f} times as long as brevitas'.",
            f"Files are {min(smaller.values()):.1f} to {max(smaller.values()):.1f} times smaller.",
            f"The slowest conversion takes {slowest:.2f} s.",
        ],
        values=rows,
        ok=all(met),
    )


def main() -> int:
    parser = common.flags(__doc__, threads=1)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each way that are measured (default: 7)")
    args = parser.parse_args()
    common.start(args.threads)
    kept = common.Kept("training", args.resume)
    rows = {
        name: kept.row(f"{name}, {args.rounds} rounds, {args.threads} threads", partial(measure, name, args.rounds))
        for name in NETWORKS
    }
    return common.finish("training", result(rows, args.rounds), args)


if __name__ == "__main__":
    sys.exit(main())
