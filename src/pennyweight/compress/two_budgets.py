"""Planning within bytes and time at once: the multiple-choice knapsack with a second row.

    minimise  sum_l d_l[j_l]   subject to  sum_l c_l[j_l] <= budget,  sum_l t_l[j_l] <= latency

`solve_hull_within` puts a price mu on time and solves what remains by convex hulls (hull.py), with d + mu * t in place
of d. L(mu) = (its linear relaxation) - mu * latency bounds the optimum from below and is concave; where its slope, the
relaxation's time minus the latency, changes sign, lies the best bound (Lagrangian relaxation: Geoffrion 1974). That mu
is found by bisection. The choices met on the way that are in time, and those too slow once repaired (layer after layer
takes the candidate that saves time for the least distortion), are improved by single moves and pairs of moves that
keep both budgets; the best of them is the answer. `solve_integer_within` is exact: HiGHS with one more row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BudgetError
from .hull import relax
from .integer_program import SCALE, Row, minimise, solve_integer
from .knapsack import IntArray, Problem, Solution, improve

_DOUBLINGS, _BISECTIONS = 60, 24
_KEPT = 4  # choices that are improved, of those in time and of those too slow


class LatencyError(BudgetError):
    """The latency is below what is reachable. least: the smallest reachable time, in the unit of the times."""

    def __init__(self, latency: float, least: float) -> None:
        super().__init__(f"a time of {latency:g} cannot be met: the smallest reachable is {least:g}")
        self.least = least


class _Trial(NamedTuple):
    """What one price gives: a choice, distortion per byte, a lower bound, and the relaxation's time."""

    position: IntArray
    slope: float
    price: float
    bound: float
    time: float


def solve_hull_within(
    costs: Sequence[ArrayLike],
    distortions: Sequence[ArrayLike],
    times: Sequence[ArrayLike],
    budget: int,
    latency: float,
) -> Solution:
    """Near-optimal choice within the budget in bytes and the latency, in the unit of the times.

    Arguments as for `solve_hull`, with times: float arrays of the same lengths. Raises LatencyError, naming the
    smallest time there is within the bytes, and BudgetError and PlanError as `solve_hull` does.
    """
    return _lagrangian(Problem.build(costs, distortions, times=times), budget, latency)[0]


def solve_integer_within(
    costs: Sequence[ArrayLike],
    distortions: Sequence[ArrayLike],
    times: Sequence[ArrayLike],
    budget: int,
    latency: float,
    *,
    mip_rel_gap: float = 1e-6,
    time_limit: float | None = None,
) -> Solution:
    """Least distortion within both, proven up to `mip_rel_gap`; otherwise as `solve_hull_within`, and never worse."""
    problem = Problem.build(costs, distortions, times=times)
    known, trial = _lagrangian(problem, budget, latency)
    assert problem.time is not None
    # As in `hull.reduce`: what Lagrangian duality puts above the known solution cannot be part of a better one.
    price = problem.distortion + trial.slope * problem.cost + trial.price * problem.time
    least_price = np.minimum.reduceat(price, problem.start)
    bound = least_price.sum() - trial.slope * budget - trial.price * latency
    rounding = 1e-9 * (np.abs(price[problem.start]).sum() + abs(bound))
    problem = problem.only(price - least_price[problem.layer] <= known.distortion - bound + rounding)
    assert problem.time is not None
    excess, slower = (values - _least(problem, values)[problem.layer] for values in (problem.distortion, problem.time))
    larger = problem.cost - problem.cost[problem.start][problem.layer]
    least = float(_least(problem, problem.distortion).sum())
    reach = known.distortion - least
    if reach <= 0.0:
        return replace(known, lower_bound=known.distortion)
    unit = int(np.gcd.reduce(larger)) or 1
    room = max(latency - float(_least(problem, problem.time).sum()), 0.0)
    to_time, tolerance = SCALE / (room or float(slower.max()) or 1.0), _tolerance(latency)
    rows = [Row(larger // unit, (budget - problem.smallest) // unit)]
    rows.append(Row(slower * to_time, room * to_time, tolerance * to_time))
    usable = np.flatnonzero((larger <= budget - problem.smallest) & (slower <= room + tolerance))
    position, bound = minimise(problem, usable, excess * (SCALE / reach), rows, mip_rel_gap, time_limit)
    bound = max(known.lower_bound, least + bound * reach / SCALE)
    if position is None or problem.distortion_at(position) > known.distortion:
        return replace(known, lower_bound=min(bound, known.distortion))
    return problem.solution(position, bound)


def _lagrangian(problem: Problem, budget: int, latency: float) -> tuple[Solution, _Trial]:
    """The hull's solution, and the trial with the best bound."""
    budget = problem.check_budget(budget)
    assert problem.time is not None
    limit = latency + _tolerance(latency)
    free = _trial(problem, budget, latency, 0.0)
    trials = [free]
    if problem.time_at(free.position) > limit:
        trials += _search(problem, budget, latency)
    in_time = [t for t in trials if problem.time_at(t.position) <= limit]
    slow = [t for t in trials if problem.time_at(t.position) > limit]
    if not in_time:
        in_time.append(_fastest(problem, budget, latency, free.slope))
    best = max(trials, key=lambda t: t.bound)
    in_time = sorted(in_time, key=lambda t: problem.distortion_at(t.position))[:_KEPT]
    starts = [t.position for t in in_time]
    for trial in sorted(slow, key=lambda t: problem.time_at(t.position))[:_KEPT]:
        mended = _repair(problem, trial, budget, limit)
        if mended is not None:
            starts.append(mended)
    found = [improve(problem, p, budget, best.slope, latency=limit, price=best.price) for p in starts]
    position = min(found, key=problem.distortion_at)
    return problem.solution(position, best.bound), best


def _trial(problem: Problem, budget: int, latency: float, price: float) -> _Trial:
    """The knapsack of bytes alone, with time at a price."""
    assert problem.time is not None
    at_price = problem.distortion + price * problem.time
    plain = Problem.sorted(problem.cost, at_price, problem.layer, np.arange(problem.cost.size))
    relaxed = relax(plain, budget)
    time = problem.time_at(plain.index[relaxed.position])
    if relaxed.fraction is not None:
        _, lower, upper, fraction = relaxed.fraction
        time += fraction * float(problem.time[upper] - problem.time[lower])
    position = plain.index[improve(plain, relaxed.position, budget, relaxed.slope)]
    bound = relaxed.bound - (price * latency if price else 0.0)
    return _Trial(position, relaxed.slope, price, bound, time)


def _search(problem: Problem, budget: int, latency: float) -> list[_Trial]:
    """Trials at prices that close in on the best one."""
    assert problem.time is not None
    span = float(np.ptp(problem.distortion)) / max(float(np.ptp(problem.time)), 1e-300)
    low, high, trials = 0.0, max(span, 1e-300) * 1e-6, []
    for _ in range(_DOUBLINGS):
        trials.append(_trial(problem, budget, latency, high))
        if trials[-1].time <= latency:
            break
        low, high = high, 4 * high
        if not math.isfinite(high * float(problem.time.max()) * problem.start.size):
            return trials
    else:
        return trials
    for _ in range(_BISECTIONS):
        price = math.sqrt(low * high) if low else high / 4
        trials.append(_trial(problem, budget, latency, price))
        if trials[-1].time <= latency:
            high = price
        else:
            low = price
        if low and high / low < 1 + 1e-6:
            break
    return trials


def _fastest(problem: Problem, budget: int, latency: float, slope: float) -> _Trial:
    """The choice of least time within the bytes; raises LatencyError if even that is too slow."""
    assert problem.time is not None
    layers = [slice(start, end) for start, end in zip(problem.start, problem.end)]
    found = solve_integer([problem.cost[at] for at in layers], [problem.time[at] for at in layers], budget)
    position = problem.start + found.choice
    if problem.time_at(position) > latency + _tolerance(latency):
        raise LatencyError(latency, problem.time_at(position))
    return _Trial(position, slope, 0.0, -math.inf, problem.time_at(position))


def _repair(problem: Problem, trial: _Trial, budget: int, limit: float) -> IntArray | None:
    """The choice made fast enough, by the moves that save time for the least distortion; None where there are none."""
    assert problem.time is not None
    position = trial.position.copy()
    while problem.time_at(position) > limit:
        dc = problem.cost - problem.cost[position][problem.layer]
        dd = problem.distortion - problem.distortion[position][problem.layer]
        dt = problem.time - problem.time[position][problem.layer]
        moves = np.flatnonzero((dt < 0) & (dc <= budget - problem.cost_at(position)))
        if moves.size == 0:
            return None
        best = moves[np.argmin((dd[moves] + trial.slope * dc[moves]) / -dt[moves])]
        position[problem.layer[best]] = best
    return position


def _least(problem: Problem, values: np.ndarray) -> np.ndarray:
    """[layers]: the least of each layer's values."""
    return np.minimum.reduceat(values, problem.start)


def _tolerance(latency: float) -> float:
    """For rounding in sums of times."""
    return 1e-9 * abs(latency)
