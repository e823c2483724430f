"""Planning by dynamic programming, after RD-Prune (arXiv 2308.10438, ICCV 2023).

    F_0[k] = 0;   F_l[k] = min over candidates j with w_l[j] <= k of  F_{l-1}[k - w_l[j]] + d_l[j],   k = 0..K

with the argmin kept for every (l, k) and the choice read back from k = K. Time O(layers * candidates * K), memory two
bytes per (layer, bucket).

Departures from paper and released code:
- Candidates that no choice better than the hull's can contain are left out (`hull.reduce`), and a layer's smallest
  remaining candidate costs nothing: only the bytes beyond it are planned, so little is lost to rounding.
- The unit of k is the greatest common divisor of all costs where that leaves at most `buckets` units: the answer is
  then exact. Otherwise the unit is larger and costs are rounded up, so that the budget holds; `knapsack.improve` spends
  what rounding left over.
- A candidate that fits exactly is allowed, and a budget that nothing fits raises. The released program refuses the
  former, breaks the budget in the latter case, leaves every 4096th entry unfilled and fills layer 1 differently.
- Monotone rounds (amounts may only grow) are given as a mask of `allowed` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .hull import reduce
from .knapsack import IntArray, Problem, Solution, improve


def solve_dynamic(
    costs: Sequence[ArrayLike],
    distortions: Sequence[ArrayLike],
    budget: int,
    *,
    allowed: Sequence[ArrayLike] | None = None,
    buckets: int = 20_000,
) -> Solution:
    """Best choice over bucketed costs; exact where (budget - smallest) / gcd of the cost differences <= `buckets`.

    Arguments and errors as for `solve_hull`, than which it is never worse; never costs more than `budget`. The
    `lower_bound` equals the distortion where the answer is exact, else it is that of the linear relaxation.
    """
    known, problem, slope = reduce(Problem.build(costs, distortions, allowed), budget)
    extra = problem.cost - problem.cost[problem.start][problem.layer]
    slack = budget - problem.smallest
    unit = int(np.gcd.reduce(extra)) or 1
    exact = slack // unit <= buckets
    if not exact:
        unit = -(-slack // buckets)
    position = _table(problem, -(-extra // unit), slack // unit)
    if exact:
        return problem.solution(position, problem.distortion_at(position))
    found = problem.solution(improve(problem, position, budget, slope), known.lower_bound)
    return min(found, known, key=lambda solution: solution.distortion)


def _table(problem: Problem, weight: IntArray, capacity: int) -> IntArray:
    """Optimal positions [layers] for integer weights [n] and a capacity; the first candidate of a layer weighs 0."""
    layers = problem.start.size
    most = int((problem.end - problem.start).max(initial=1))
    argmin = np.zeros((layers, capacity + 1), dtype=np.int16 if most <= 2**15 else np.int32)
    best = np.zeros(capacity + 1)
    for layer, (start, end) in enumerate(zip(problem.start, problem.end)):
        before, best = best, best + problem.distortion[start]
        for j in range(start + 1, end):
            w = int(weight[j])
            if w > capacity:
                break  # candidates are sorted by cost
            trial = before[: capacity + 1 - w] + problem.distortion[j]
            better = trial < best[w:]
            np.copyto(best[w:], trial, where=better)
            np.copyto(argmin[layer, w:], j - start, where=better)
    position = problem.start.copy()
    left = capacity
    for layer in reversed(range(layers)):
        position[layer] += argmin[layer, left]
        left -= int(weight[position[layer]])
    return position
