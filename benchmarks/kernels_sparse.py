"""Weights of few non-zeros, and sums of parts, as they run: against torch's dense fp32 on this machine.

    python benchmarks/kernels_sparse.py                # two minutes on one core
    python benchmarks/kernels_sparse.py --rounds 3     # a look

4096 x 4096 with random masks, float32 inputs. All ways of one number of inputs take turns within a round; minima over
the rounds of processor time (of all threads together), which other processes disturb least. The exit code is 1 if a
sparse weight is slower than the dense one at one input.
"""

from __future__ import annotations

import argparse
import functools
import sys

import torch
from torch.nn import functional as F

import common
from common import Result, Row, Table, verdict
from pennyweight import kernels
from pennyweight.formats import Binary, PackedWeight, Partial, SignedLowRank, Sparse, Stacked

SIDE = 4096
INPUTS = (1, 4, 16, 128)
DENSE = "torch fp32, dense"


def weights() -> dict[str, PackedWeight]:
    weight, share = torch.randn(SIDE, SIDE), torch.rand(SIDE, SIDE)
    made: dict[str, PackedWeight] = {
        f"sparse, {kept:.0%} kept, {name}": Sparse.encode(weight, share < kept, bits)
        for kept in (0.05, 0.1, 0.2)
        for name, bits in (("float16", 16), ("8 bits", 8))
    }
    made["partial, 10% salient, 8 bits"] = Partial.encode(weight, share < 0.1, 0)
    made["stacked, 3 stages of signs"] = Stacked.encode(weight, 3, functools.partial(Binary.encode, group=0))
    for rank in (1, 16):
        factors = torch.rand(SIDE, rank), torch.rand(rank, SIDE)
        made[f"signed-lowrank, rank {rank}"] = SignedLowRank.from_factors(weight, *factors)
    return made


def measure(rounds: int) -> Row:
    """inputs -> way -> milliseconds of processor time, the least of all rounds."""
    dense = torch.randn(SIDE, SIDE)
    running = {name: packed.for_running() for name, packed in weights().items()}
    times: Row = {}
    for inputs in INPUTS:
        x = torch.randn(inputs, SIDE)
        ways = {DENSE: functools.partial(F.linear, x, dense)}
        ways |= {name: functools.partial(weight.linear, x) for name, weight in running.items()}
        least = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds + 1):  # memory and threads come with the first call
            for name, way in ways.items():
                watch = common.Stopwatch()
                way()
                least[name] = min(least[name], 1e3 * watch.read()["processor_seconds"])
        times[str(inputs)] = least
    return times


def main() -> int:
    args = arguments()
    common.start(args.threads)
    if not kernels.is_compiled():
        sys.exit("the compiled kernels are missing; there is nothing to measure")
    instructions = args.instructions or kernels._cpu.instruction_sets()[-1]
    kernels._cpu.use(instructions)
    setting = f"{args.threads} threads, {instructions}, {args.rounds} rounds"
    times = common.Kept("kernels-sparse", args.resume).row(setting, lambda: measure(args.rounds))
    cells = {
        name: [f"{times[n][name]:.2f} ({times[n][DENSE] / times[n][name]:.1f})" for n in times] for name in times["1"]
    }
    slower = [name for name, least in times["1"].items() if name.startswith("sparse") and least >= times["1"][DENSE]]
    conclusion = "sparse weights are faster than dense fp32 at one input: " + verdict(not slower)
    result = Result(
        title="Few non-zeros, and sums of parts",
        claim="at one input a sparse weight is faster than torch's dense fp32",
        data=f"random {SIDE} x {SIDE} weights; {setting}; minima of interleaved runs, of processor time",
        tables=[
            Table("Processor milliseconds (times as fast as dense)", ("way", *(f"inputs: {n}" for n in times)), cells)
        ],
        conclusions=[conclusion + "."],
        values=times,
        ok=not slower,
    )
    return common.finish("kernels-sparse", result, args)


def arguments() -> argparse.Namespace:
    parser = common.flags(__doc__, threads=1)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of interleaved runs")
    parser.add_argument("--instructions", metavar="NAME", help="instruction set (default: the best there is)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
