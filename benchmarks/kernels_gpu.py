"""Products with packed weights on a GPU, against torch's float16 `linear` in the same run.

    python benchmarks/kernels_gpu.py                  # about a minute; needs a CUDA GPU and pennyweight[gpu]
    python benchmarks/kernels_gpu.py --page           # writes docs/results/kernels-gpu.md

A weight of 4096x4096 in groups of 64 at 1, 2, 3 and 4 bits meets 1 row (decoding) and 128 rows (a batch) of float16.
"kernel" is the time on the GPU: one product in a CUDA graph, replayed with a cold L2 cache, median of rounds that
alternate between the products. "call" is the time of a call from Python, which launching dominates where the product is
short. Before timing, every product is compared with float64.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import Result, Row, Table
from pennyweight.errors import require
from pennyweight.formats import Binary, Integer
from pennyweight.kernels.gpu import GpuIntegers

SIDE, GROUP = 4096, 64
BITS = (1, 2, 3, 4)
X_ROWS = (1, 128)
LARGEST_ERROR = 2e-3  # of the largest output: the weight and the result are rounded to float16
COLUMNS = ("weight", "rows of x", "kernel, µs", "times torch fp16", "call, µs", "MB held", "GB/s of weight")


def packed(bits: int, weight: Tensor) -> GpuIntegers:
    stored = Binary.encode(weight, GROUP) if bits == 1 else Integer.encode(weight, bits, GROUP, symmetric=True)
    return GpuIntegers.from_format(stored).to("cuda")


def graph_of(product: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """The product as a graph, after runs that compile it."""
    for _ in range(3):
        product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product()
    return graph


def call_seconds(product: Callable[[], Tensor], calls: int = 200) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        product()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def check(name: str, weight: GpuIntegers, x: Tensor) -> None:
    exact = x.double() @ weight.decode().double().T
    error = float((weight.linear(x).double() - exact).abs().max() / exact.abs().max())
    if not error < LARGEST_ERROR:
        sys.exit(f"the product with {name} is wrong: largest error {error:.2g} of the largest output")


def measure(rounds: int) -> list[Row]:
    do_bench = require("triton.testing", "gpu").do_bench
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator)
    dense = weight.to("cuda", torch.float16)
    weights = {f"{bits} bit{'s' if bits > 1 else ''}": packed(bits, weight) for bits in BITS}
    rows: list[Row] = []
    for x_rows in X_ROWS:
        x = torch.randn(x_rows, SIDE, generator=generator).to("cuda", torch.float16)
        products: dict[str, Callable[[], Tensor]] = {"torch fp16": lambda x=x: F.linear(x, dense)}
        held = {"torch fp16": dense.numel() * dense.element_size()}
        for name, small in weights.items():
            check(name, small, x)
            products[name] = lambda x=x, small=small: small.linear(x)
            held[name] = small.nbytes
        graphs = {name: graph_of(product) for name, product in products.items()}
        times: dict[str, list[float]] = {name: [] for name in products}
        for _ in range(rounds):
            for name, graph in graphs.items():
                times[name].append(1e-3 * do_bench(graph.replay, warmup=10, rep=50, return_mode="median"))
        for name, product in products.items():
            rows.append(
                {
                    "weight": name,
                    "x_rows": x_rows,
                    "kernel_seconds": statistics.median(times[name]),
                    "ratio": statistics.median(times["torch fp16"]) / statistics.median(times[name]),
                    "call_seconds": call_seconds(product),
                    "bytes": held[name],
                }
            )
    return rows


def main() -> int:
    parser = common.flags(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default: 5)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernels_gpu.py needs a CUDA GPU, and torch sees none here; nothing was measured")
    common.start(args.threads)
    rows = measure(args.rounds)
    cells = {
        f"{row['weight']}, {row['x_rows']}": (
            str(row["x_rows"]),
            f"{1e6 * row['kernel_seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{1e6 * row['call_seconds']:.1f}",
            f"{1e-6 * row['bytes']:.1f}",
            f"{1e-9 * row['bytes'] / row['kernel_seconds']:.0f}",
        )
        for row in rows
    }
    result = Result(
        title="Packed weights on a GPU",
        claim="How a product with weights of 1 to 4 bits compares with torch's float16 product on the same GPU.",
        data=f"A random weight of {SIDE}x{SIDE} in groups of {GROUP}; {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, triton {require('triton', 'gpu').__version__}.",
        tables=[Table("Time of one product; higher ratios are better", COLUMNS, cells)],
        conclusions=[
            f"{row['weight']}, {row['x_rows']} row{'s' if row['x_rows'] > 1 else ''}: {row['ratio']:.2f} times as fast "
            "as torch fp16"
            for row in rows
            if row["weight"] != "torch fp16"
        ],
        values=rows,
        ok=True,
    )
    return common.finish("kernels-gpu", result, args)


if __name__ == "__main__":
    sys.exit(main())
