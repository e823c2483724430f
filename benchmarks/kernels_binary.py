"""Signs times signs: the packed kernels against torch's fp32, bf16 and int8 on this machine.

    python benchmarks/kernels_binary.py                # two minutes on 2 cores, most of them torch int8
    python benchmarks/kernels_binary.py --rounds 3     # a look

1. A linear layer, 1024 inputs, 4096 x 4096. Goal: at least 12 times torch fp32 and twice torch bf16.
2. A 3 x 3 convolution, 256 to 256 channels, 28 x 28, padding 1, one image and eight. Goal: at least 8 times torch fp32.
Each is timed from packed signs to int32; from packed signs to the packed signs of the next layer; and from float32 to
scaled float32, which packs the inputs first. All ways of one layer take turns within a round; medians over the rounds.
The goals were set for a processor with AVX-512: where there is none, fp32 is half as fast and bf16 has no instructions,
while signs lose their population count. The exit code is 1 if one is missed. Run it while nothing else runs; where that
cannot be, processor time with --threads 1 is what other processes change least.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch.nn import functional as F

import common
from common import Result, Row, Table, verdict
from pennyweight import kernels
from pennyweight.kernels import binary
from pennyweight.kernels.binary import Scaled, Thresholds

ROWS, OUTPUTS, COLUMNS = 1024, 4096, 4096
CHANNELS, SIDE = 256, 28
PACKED = "packed signs to int32"
Ways = dict[str, Callable[[], object]]


def thresholds(outputs: int) -> Thresholds:
    return Thresholds(torch.zeros(outputs, dtype=torch.int32), torch.zeros(outputs, dtype=torch.bool))


def linear() -> Ways:
    x, weight = torch.randn(ROWS, COLUMNS), torch.randn(OUTPUTS, COLUMNS)
    packed, packed_weight = binary.pack_signs(x), binary.pack_signs(weight)
    scaled, to_signs = Scaled(torch.rand(OUTPUTS), torch.randn(OUTPUTS)), thresholds(OUTPUTS)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    byte, byte_weight = x.sign().to(torch.int8), weight.sign().to(torch.int8)
    return {
        "torch fp32": lambda: F.linear(x, weight),
        "torch bf16": lambda: F.linear(half, half_weight),
        "torch int8": lambda: torch._int_mm(byte, byte_weight.T),
        PACKED: lambda: binary.binary_linear(packed, packed_weight, COLUMNS),
        "packed signs to packed signs": lambda: binary.binary_linear(packed, packed_weight, COLUMNS, to_signs),
        "float32 to float32": lambda: binary.binary_linear(binary.pack_signs(x), packed_weight, COLUMNS, scaled),
    }


def convolution(images: int) -> Ways:
    x, weight = torch.randn(images, CHANNELS, SIDE, SIDE), torch.randn(CHANNELS, CHANNELS, 3, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    packed, filters = binary.pack_images(x), binary.pack_filters(weight)
    scaled, to_signs = Scaled(torch.rand(CHANNELS), torch.randn(CHANNELS)), thresholds(CHANNELS)
    half, half_weight = last.bfloat16(), weight.bfloat16().contiguous(memory_format=torch.channels_last)
    last_weight = weight.contiguous(memory_format=torch.channels_last)

    def packed_way(epilogue: binary.Epilogue = None) -> object:
        return binary.binary_conv2d(packed, filters, CHANNELS, padding=1, padding_value=0, epilogue=epilogue)

    return {
        "torch fp32": lambda: F.conv2d(x, weight, padding=1),
        "torch fp32, channels last": lambda: F.conv2d(last, last_weight, padding=1),
        "torch bf16, channels last": lambda: F.conv2d(half, half_weight, padding=1),
        PACKED: packed_way,
        "packed signs to packed signs": lambda: packed_way(to_signs),
        "float32 to float32": lambda: binary.binary_conv2d(
            binary.pack_images(last), filters, CHANNELS, padding=1, padding_value=0, epilogue=scaled
        ),
    }


def measure(ways: Ways, rounds: int) -> dict[str, Row]:
    """name -> medians of interleaved runs: milliseconds on the wall, and of processor time (of all threads together).

    Ways shorter than 20 ms run several times in a round; those longer than a second in three rounds only.
    """
    repeats, times = {}, {name: [] for name in ways}
    for name, way in ways.items():
        way()  # memory and threads come with the first call
        watch = common.Stopwatch()
        way()
        seconds = watch.read()["seconds"]
        repeats[name] = [max(1, round(0.02 / seconds))] * (rounds if seconds < 1 else min(rounds, 3))
    for i in range(rounds):
        for name, way in ways.items():
            for _ in range(repeats[name][i] if i < len(repeats[name]) else 0):
                watch = common.Stopwatch()
                way()
                times[name].append(watch.read())
    return {
        name: {kind: 1e3 * statistics.median(read[kind] for read in reads) for kind in reads[0]}
        for name, reads in times.items()
    }


def table(title: str, row: Row, products: int, goals: dict[str, float]) -> tuple[Table, list[bool]]:
    """goals: peer -> how many times faster than it the packed layer must be."""
    cells, met = {}, []
    for name, medians in row.items():
        milliseconds = medians["seconds"]
        faster = {kind: value / row[PACKED][kind] for kind, value in medians.items()}
        wanted = goals.get(name)
        met += [] if wanted is None else [faster["seconds"] >= wanted]
        cells[name] = [
            f"{milliseconds:.2f}", f"{products / milliseconds / 1e6:.0f}", f"{faster['seconds']:.1f}",
            "" if wanted is None else f">= {wanted:g}", verdict(None if wanted is None else met[-1]),
            f"{medians['processor_seconds']:.2f}", f"{faster['processor_seconds']:.1f}",
        ]  # fmt: skip
    columns = (
        "way", "ms", "multiply-adds per ns", "ms, ratio to packed", "goal", "met",
        "processor ms", "processor ms, ratio to packed",
    )  # fmt: skip
    return Table(title, columns, cells), met


def arguments() -> argparse.Namespace:
    parser = common.flags(__doc__)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of interleaved runs")
    parser.add_argument("--instructions", metavar="NAME", help="instruction set (default: the best there is)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    common.start(args.threads)
    if not kernels.is_compiled():
        sys.exit("the compiled kernels are missing; there is nothing to measure")
    instructions = args.instructions or kernels._cpu.instruction_sets()[-1]
    kernels._cpu.use(instructions)
    kept = common.Kept("kernels-binary", args.resume)
    setting = f"{args.threads} threads, {instructions}, {args.rounds} rounds"
    layers: list[tuple[str, Callable[[], Ways], int, dict[str, float]]] = [
        (
            f"Linear, {ROWS} inputs, {OUTPUTS} x {COLUMNS}", linear, ROWS * OUTPUTS * COLUMNS,
            {"torch fp32": 12, "torch bf16": 2},
        ),
        *(
            (
                f"Convolution 3 x 3, {CHANNELS} channels, {SIDE} x {SIDE}, batch {images}",
                lambda images=images: convolution(images), images * (SIDE * CHANNELS * 3) ** 2, {"torch fp32": 8},
            )
            for images in (1, 8)
        ),
    ]  # fmt: skip
    tables, met, lines, values = [], [], [], {}
    for title, ways, products, goals in layers:
        row = kept.row(f"{title}, {setting}", lambda ways=ways: measure(ways(), args.rounds))
        page, fulfilled = table(title, row, products, goals)
        tables.append(page)
        met += fulfilled
        values[title] = row
        ratios = ", ".join(
            f"{row[peer]['seconds'] / row[PACKED]['seconds']:.1f} times {peer} (goal: {goal:g})"
            for peer, goal in goals.items()
        )
        lines.append(f"{title}: {ratios}.")
    result = Result(
        title="Signs times signs",
        claim="a W1A1 linear layer at least 12 times as fast as torch fp32 and twice as fast as bf16, "
        "a W1A1 convolution at least 8 times as fast as torch fp32",
        data=f"random numbers; {setting}; medians of interleaved runs",
        tables=tables,
        conclusions=lines,
        values=values,
        ok=all(met),
    )
    return common.finish("kernels-binary", result, args)


if __name__ == "__main__":
    sys.exit(main())
