"""Planning by convex hulls: the linear relaxation of the multiple-choice knapsack, rounded and mended.

Every layer's candidates are reduced to their lower convex hull in the (bytes, distortion) plane. Its segments, of all
layers together, are sorted by the distortion they save per byte; from the smallest choice on, segments are taken in
that order until the next one no longer fits. Taking only the fraction of it that fits would solve the linear relaxation
exactly (a layer's segments get flatter and flatter, so the order never asks for a later one first), hence

    optimum of the relaxation <= optimum <= prefix without the fraction,

and the two ends differ by less than one segment. `knapsack.improve` then spends the slack. Time O(n log n) in the
number n of candidates. The relaxation is textbook (Sinha and Zoltners 1979; Dyer 1984, Zemel 1984 solve it in O(n)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .knapsack import FloatArray, FractionalStep, IntArray, Problem, Solution, improve


@dataclass(frozen=True)
class Relaxation:
    """Optimum of the linear relaxation: `position` [layers] before the fractional step, `slope` of that step in
    distortion per byte (0 if everything fits), `bound` the optimal value, and the step itself."""

    position: IntArray
    slope: float
    bound: float
    fraction: FractionalStep | None


@dataclass(frozen=True)
class Frontier:
    """All choices on the hull, from largest to smallest: cost int64 [points], distortion float64 [points]."""

    cost: IntArray
    distortion: FloatArray
    _problem: Problem
    _lower: IntArray  # flat positions, by which point k + 1 differs from point k
    _first: IntArray

    def choice(self, point: int) -> IntArray:
        """int64 [layers]: the candidates chosen at that point."""
        position = self._first.copy()
        steps = self._lower[: range(self.cost.size)[point]]
        position[self._problem.layer[steps]] = steps  # the last write of a layer wins: its smallest candidate so far
        return self._problem.index[position]


@dataclass(frozen=True)
class _Segments:
    """Hull segments from steep to flat; flat positions of their ends, what they cost and what they save per byte."""

    lower: IntArray
    upper: IntArray
    cost: IntArray
    slope: FloatArray


def solve_hull(
    costs: Sequence[ArrayLike],
    distortions: Sequence[ArrayLike],
    budget: int,
    *,
    allowed: Sequence[ArrayLike] | None = None,
) -> Solution:
    """Near-optimal choice for budgets in bytes; never costs more than `budget`.

    costs: one int array a layer, bytes of its candidates; distortions: float arrays of the same lengths; allowed: bool
    arrays, False forbids. The solution carries the bound and the fractional step of the relaxation. Raises BudgetError
    (naming the smallest reachable cost) and PlanError as `Problem` does.
    """
    problem = Problem.build(costs, distortions, allowed)
    return _round(problem, relax(problem, problem.check_budget(budget)), budget)


def reduce(problem: Problem, budget: int) -> tuple[Solution, Problem, float]:
    """What an exact solver starts from: the hull's solution, the candidates a better one may contain, and the slope.

    By Lagrangian duality a choice with candidate j in layer l has at least the distortion bound + r_lj, where
    r_lj = d_lj + slope * c_lj - min_i (d_li + slope * c_li). Candidates that this puts above the known solution drop
    out: nearly all of them, where the known solution is good.
    """
    relaxed = relax(problem, problem.check_budget(budget))
    known = _round(problem, relaxed, budget)
    price = problem.distortion + relaxed.slope * problem.cost
    reduced = price - np.minimum.reduceat(price, problem.start)[problem.layer]
    rounding = 1e-9 * (np.abs(problem.distortion[problem.start]).sum() + relaxed.slope * budget)
    return known, problem.only(reduced <= known.distortion - known.lower_bound + rounding), relaxed.slope


def _round(problem: Problem, relaxed: Relaxation, budget: int) -> Solution:
    position = improve(problem, relaxed.position, budget, relaxed.slope)
    return problem.solution(position, relaxed.bound, relaxed.fraction)


def frontier(costs: Sequence[ArrayLike], distortions: Sequence[ArrayLike]) -> Frontier:
    """Every choice the relaxation takes at some budget without splitting a layer, from largest to smallest."""
    problem = Problem.build(costs, distortions)
    segments = _hull_segments(problem)
    position = problem.start.copy()
    position[problem.layer[segments.upper]] = segments.upper
    saved = problem.distortion[segments.lower] - problem.distortion[segments.upper]
    cost = problem.smallest + np.concatenate([[0], np.cumsum(segments.cost)])
    # Summed from the good end: there distortions are small, and cancellation would show.
    distortion = problem.distortion_at(position) + np.concatenate([[0.0], np.cumsum(saved[::-1])])
    return Frontier(cost[::-1], distortion, problem, segments.lower[::-1], position)


def relax(problem: Problem, budget: int) -> Relaxation:
    """Solve the linear relaxation; the budget must have passed `problem.check_budget`."""
    segments = _hull_segments(problem)
    reached = problem.smallest + np.cumsum(segments.cost)
    taken = int(np.searchsorted(reached, budget, side="right"))
    position = problem.start.copy()
    position[problem.layer[segments.upper[:taken]]] = segments.upper[:taken]
    bound = problem.distortion_at(position)
    if taken == segments.cost.size:
        return Relaxation(position, 0.0, bound, None)
    lower, upper = int(segments.lower[taken]), int(segments.upper[taken])
    fraction = (budget - problem.cost_at(position)) / int(segments.cost[taken])
    step = FractionalStep(int(problem.layer[lower]), int(problem.index[lower]), int(problem.index[upper]), fraction)
    bound -= fraction * float(problem.distortion[lower] - problem.distortion[upper])
    return Relaxation(position, float(segments.slope[taken]), bound, step)


def _hull_segments(problem: Problem) -> _Segments:
    """Lower hulls of all layers at once: drop every point on or above the chord of its neighbours until none is left.

    Both neighbours are candidates of the layer, so a dropped point is never on the hull, and dropping many in one sweep
    is safe. The test compares the very slopes that are sorted later, so rounding cannot put a layer's segments in the
    wrong order.
    """
    point = np.arange(problem.cost.size)
    while True:
        lower, upper = point[:-1], point[1:]
        inside = problem.layer[lower] == problem.layer[upper]
        run = np.where(inside, problem.cost[upper] - problem.cost[lower], 1)
        slope = np.where(inside, (problem.distortion[lower] - problem.distortion[upper]) / run, np.inf)
        above = np.zeros(point.size, dtype=bool)
        above[1:-1] = inside[:-1] & inside[1:] & (slope[:-1] <= slope[1:])
        if not above.any():
            break
        point = point[~above]
    lower, upper, run, slope = lower[inside], upper[inside], run[inside], slope[inside]
    order = np.lexsort((lower, run, -slope))
    return _Segments(lower[order], upper[order], run[order], slope[order])
