"""Seconds and quality of the three planners on ladders of synthetic networks.

    python benchmarks/planner.py [--json]

Every layer has a log-normal number of weights and candidates between 1 and 8 bits whose distortion falls by a factor of
four a bit, with noise (so about half of the candidates are dominated). The budget is 3 bits a weight. "gap" is the
distortion above the best proven lower bound, in percent; "unspent" the share of the budget left over.

Seen on one busy core of a cloud machine: hull, 10,000 layers x 50 candidates, in 0.5-0.8 s.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pennyweight.compress.allocate import SOLVERS, solve
from pennyweight.compress.hull import frontier

LADDER = ((10, 10), (40, 50), (100, 50), (1000, 50), (10_000, 50))


def network(
    layers: int, candidates: int, seed: int = 0
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float64]], int]:
    """Costs and distortions of every layer's candidates, and a budget of 3 bits a weight."""
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(11, 1.5, (layers, 1))
    bits = np.sort(rng.uniform(1, 8, (layers, candidates)), axis=1)
    sensitivity = weights * rng.lognormal(0, 1, (layers, 1))
    distortion = sensitivity * 4.0**-bits * rng.lognormal(0, 0.3, (layers, candidates))
    return list((weights * bits / 8).astype(np.int64)), list(distortion), int(weights.sum() * 3 / 8)


def measure() -> list[dict[str, Any]]:
    rows = []
    for layers, candidates in track(LADDER, description="planning", console=Console(stderr=True), transient=True):
        costs, distortions, budget = network(layers, candidates)
        solved, seconds = {}, {}
        for name in SOLVERS:
            begin = time.perf_counter()
            solved[name] = solve(costs, distortions, budget, name)
            seconds[name] = time.perf_counter() - begin
        bound = max(solution.lower_bound for solution in solved.values())
        begin = time.perf_counter()
        points = frontier(costs, distortions).cost.size
        frontier_seconds = time.perf_counter() - begin
        for name, solution in solved.items():
            rows.append(
                {
                    "layers": layers,
                    "candidates": candidates,
                    "solver": name,
                    "seconds": seconds[name],
                    "gap_percent": 100 * (solution.distortion / bound - 1),
                    "unspent_percent": 100 * (budget - solution.cost) / budget,
                    "frontier_points": points,
                    "frontier_seconds": frontier_seconds,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    rows = measure()
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("layers", "candidates", "solver", "seconds", "gap %", "unspent %", "points", "frontier s")
    for row in rows:
        table.add_row(
            f"{row['layers']:,}",
            str(row["candidates"]),
            row["solver"],
            f"{row['seconds']:.3f}",
            f"{row['gap_percent']:.5f}",
            f"{row['unspent_percent']:.5f}",
            f"{row['frontier_points']:,}",
            f"{row['frontier_seconds']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
