"""Step time and memory of pennyweight's optimizers beside torch's AdamW and SGD, 20 M parameters.

    python benchmarks/optimizers.py                # two minutes on one core
    python benchmarks/optimizers.py --rounds 3     # a look

20 weights of 1000 x 1000 in float32 on the CPU. All optimizers take turns within a round; minima over the rounds of
processor time, which other processes disturb least (they still share its caches, its memory and, of hyperthreads, its
units). Memory is measured in a process for each optimizer: what it holds between steps beside weights and gradients,
and the most it holds above that during a step. The exit code is 1 if PAdamW or PSGD takes more than 1.15 of the time of
the faster of torch's foreach and fused versions, or more memory than the fused one. What goes around any optimizer is
shown, not judged: it has to keep a number for every weight while the other one steps, and cannot do with one pass.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import common
from common import Result, Row, Table, verdict
from pennyweight.optim import LAWN, PSGD, PAdamW, PNormDecay

LAYERS, SIDE = 20, 1000
LIMIT = 1.15
ADAM, MOMENTUM = "AdamW", "SGD"
WAYS_OF_TORCH = ("foreach", "fused")
JUDGED = ("PAdamW", "PSGD")
#: Megabytes that one process takes more than the next though it does the same: a tenth of the weights.
SLACK = 0.1 * LAYERS * SIDE * SIDE * 4 / 1e6
SETTING: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-4}
PLAIN: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0}
ROLLING: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.9}
DECAYED: dict[str, Any] = {**ROLLING, "weight_decay": 1e-4}

#: name -> (what it is compared with, how it is made for a model)
WAYS: dict[str, tuple[str, Callable[[nn.Module], Optimizer]]] = {
    "AdamW, foreach": (ADAM, lambda m: AdamW(m.parameters(), **SETTING, foreach=True)),
    "AdamW, fused": (ADAM, lambda m: AdamW(m.parameters(), **SETTING, fused=True)),
    "PAdamW, p 2": (ADAM, lambda m: PAdamW(m.parameters(), **SETTING, p=2)),
    "PAdamW, p 1": (ADAM, lambda m: PAdamW(m.parameters(), **SETTING, p=1)),
    "PAdamW, p 0.8": (ADAM, lambda m: PAdamW(m.parameters(), **SETTING, p=0.8)),
    "PAdamW, p 0.5": (ADAM, lambda m: PAdamW(m.parameters(), **SETTING, p=0.5)),
    "PNormDecay(AdamW fused), p 0.8": (
        ADAM,
        lambda m: PNormDecay(AdamW(m.parameters(), **PLAIN, fused=True), 1e-4, 0.8),
    ),
    "LAWN(Adam fused), last layer": (ADAM, lambda m: LAWN(Adam(m.parameters(), fused=True), m, ["19.weight"])),
    "LAWN(Adam fused), all layers": (ADAM, lambda m: LAWN(Adam(m.parameters(), fused=True), m, "all_matrices")),
    "SGD, foreach": (MOMENTUM, lambda m: SGD(m.parameters(), **DECAYED, foreach=True)),
    "SGD, fused": (MOMENTUM, lambda m: SGD(m.parameters(), **DECAYED, fused=True)),
    "PSGD, p 1": (MOMENTUM, lambda m: PSGD(m.parameters(), **DECAYED, p=1)),
    "PSGD, p 0.8": (MOMENTUM, lambda m: PSGD(m.parameters(), **DECAYED, p=0.8)),
    "PSGD, p 0.5": (MOMENTUM, lambda m: PSGD(m.parameters(), **DECAYED, p=0.5)),
    "PNormDecay(SGD fused), p 1": (MOMENTUM, lambda m: PNormDecay(SGD(m.parameters(), **ROLLING, fused=True), 1e-4)),
    "LAWN(SGD fused), last layer": (
        MOMENTUM,
        lambda m: LAWN(SGD(m.parameters(), **ROLLING, fused=True), m, ["19.weight"]),
    ),
}
#: The ways whose memory is measured.
WEIGHED = (
    *(f"{name}, {how}" for name in (ADAM, MOMENTUM) for how in WAYS_OF_TORCH),
    *("PAdamW, p 0.8", "PSGD, p 0.8", "PNormDecay(AdamW fused), p 0.8"),
)


def network() -> nn.Module:
    """The weights, with gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight) * 1e-2
    return model


def seconds(rounds: int) -> Row:
    """way -> milliseconds of processor time, the least of all rounds."""
    steps: dict[str, Callable[[], Any]] = {name: make(network()).step for name, (_, make) in WAYS.items()}
    least = dict.fromkeys(steps, float("inf"))
    for turn in range(rounds + 2):
        for name, step in steps.items():
            watch = common.Stopwatch()
            step()
            if turn > 1:  # state and memory come with the first steps
                least[name] = min(least[name], 1e3 * watch.read()["processor_seconds"])
    return least


def memory(name: str) -> list[float]:
    """[megabytes held between steps, megabytes more at the peak of a step], beside weights and gradients."""
    model = network()
    before = common.memory_now()
    optimizer = WAYS[name][1](model)
    optimizer.step()
    held = sum(
        t.nbytes
        for t in itertools.chain(*(s.values() for s in optimizer.state.values()))
        if isinstance(t, torch.Tensor)
    )
    optimizer.step()
    return [held / 1e6, max(0.0, common.peak_memory() - before - held) / 1e6]


def main() -> int:
    args = arguments()
    common.start(args.threads)
    kept = common.Kept("optimizers", args.resume)
    setting = f"{args.threads} threads, {args.rounds} rounds"
    times = kept.row(setting, lambda: seconds(args.rounds))
    bytes_held = {
        name: kept.row(f"memory, {name}", lambda name=name: {"mb": common.in_fresh_process(memory, name)})["mb"]
        for name in WEIGHED
    }
    cells, slow, large = {}, [], []
    for name, milliseconds in times.items():
        baseline = WAYS[name][0]
        ratios = [milliseconds / times[f"{baseline}, {how}"] for how in WAYS_OF_TORCH]
        held, more = bytes_held.get(name, ("", ""))
        cells[name] = [milliseconds, *(f"{ratio:.2f}" for ratio in ratios), held, more]
        if name.startswith(JUDGED):
            if max(ratios) > LIMIT:
                slow.append(f"{name} ({max(ratios):.2f})")
            if name in bytes_held and sum(bytes_held[name]) > sum(bytes_held[f"{baseline}, fused"]) + SLACK:
                large.append(name)
    conclusions = [
        f"PAdamW and PSGD within {LIMIT} of the faster of torch's versions: {verdict(not slow)}"
        + (f"; slower: {', '.join(slow)}" if slow else ""),
        f"no more memory than torch's fused versions: {verdict(not large)}"
        + (f"; more: {', '.join(large)}" if large else ""),
    ]
    result = Result(
        title="A step of the optimizers",
        claim=f"p-norm weight decay costs at most {LIMIT} of torch's fastest step, and no memory",
        data=f"{LAYERS} weights of {SIDE} x {SIDE}, float32, CPU; {setting}, interleaved; minima of processor time",
        tables=[
            Table(
                "Processor milliseconds of a step, and megabytes beside weights and gradients",
                ("optimizer", "ms", "of foreach", "of fused", "held MB", "more in a step MB"),
                cells,
            )
        ],
        conclusions=conclusions,
        values={"times": times, "memory": bytes_held},
        ok=not slow and not large,
    )
    return common.finish("optimizers", result, args)


def arguments() -> argparse.Namespace:
    parser = common.flags(__doc__, threads=1)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of interleaved runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
