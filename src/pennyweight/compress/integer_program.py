"""Planning by integer programming, after AdaQuant / CalibTIP (arXiv 2006.10518), with HiGHS through SciPy.

    x_lj in {0, 1},  sum_j x_lj = 1 for every layer,
    `solve_integer`:  minimise sum d_lj x_lj  subject to  sum c_lj x_lj <= budget      (the paper's form)
    `smallest_cost`:  minimise sum c_lj x_lj  subject to  sum d_lj x_lj <= limit       (the released code's form)

Departures: any candidates instead of two bit widths a layer, bytes instead of bits saved, and no floor under the losses
(the code lifts them to 1e-6; here negative distortions are as good as others, only differences count).

HiGHS has absolute tolerances near 1e-6, so both forms are posed relative to each layer's best candidate and scaled.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ..errors import BudgetError
from .hull import reduce
from .knapsack import FloatArray, IntArray, Problem, Solution

# Distortions are scaled to this size: HiGHS's absolute tolerances of 1e-6 become 1e-10 of it.
SCALE = 1e4


def solve_integer(
    costs: Sequence[ArrayLike],
    distortions: Sequence[ArrayLike],
    budget: int,
    *,
    allowed: Sequence[ArrayLike] | None = None,
    mip_rel_gap: float = 1e-6,
    time_limit: float | None = None,
) -> Solution:
    """Least distortion within the budget, proven up to `mip_rel_gap` (of the distortion above the least possible).

    Arguments and errors as for `solve_hull`, than which it is never worse. time_limit: seconds after which the best
    choice found so far is returned; results may then differ from machine to machine.
    """
    known, problem, _ = reduce(Problem.build(costs, distortions, allowed), budget)
    excess, extra, unit = _above_best(problem)
    least = problem.distortion_at(problem.end - 1)
    reach = known.distortion - least
    if reach <= 0.0:
        return replace(known, lower_bound=known.distortion, fraction=None)
    slack, scale = (budget - problem.smallest) // unit, SCALE / reach
    usable = np.flatnonzero(extra <= slack)
    position, bound = minimise(problem, usable, excess * scale, [Row(extra, slack)], mip_rel_gap, time_limit)
    bound = max(known.lower_bound, least + bound / scale)
    if position is None or problem.distortion_at(position) > known.distortion:
        return replace(known, lower_bound=min(bound, known.distortion), fraction=None)
    return problem.solution(position, bound)


def smallest_cost(
    costs: Sequence[ArrayLike],
    distortions: Sequence[ArrayLike],
    limit: float,
    *,
    allowed: Sequence[ArrayLike] | None = None,
    mip_rel_gap: float = 1e-6,
    time_limit: float | None = None,
) -> Solution:
    """Fewest bytes whose distortion is at most `limit` (up to 1e-9 of its size, for rounding).

    Other arguments as for `solve_integer`. The answer's `lower_bound` is in bytes. Raises BudgetError, naming the least
    distortion there is, if that lies above the limit.
    """
    problem = Problem.build(costs, distortions, allowed)
    known = problem.end - 1
    least = problem.distortion_at(known)
    tolerance = 1e-9 * max(abs(limit), float(np.abs(problem.distortion[known]).sum()))
    if not least <= limit + tolerance:
        raise BudgetError(f"a distortion of at most {limit:g} cannot be met: the least reachable is {least:.9g}")
    excess, extra, unit = _above_best(problem)
    room = max(limit - least, 0.0)
    usable = np.flatnonzero(excess <= room + tolerance)
    scale = SCALE / (room + tolerance or 1.0)
    within = Row(excess * scale, room * scale, tolerance * scale)
    position, bound = minimise(problem, usable, extra.astype(np.float64), [within], mip_rel_gap, time_limit)
    if position is None:
        position = known
    cost = problem.cost_at(position)
    bound = max(problem.smallest + unit * bound, problem.smallest)
    return Solution(problem.index[position], cost, problem.distortion_at(position), min(float(cost), bound))


def _above_best(problem: Problem) -> tuple[FloatArray, IntArray, int]:
    """Distortion above the layer's least [n]; bytes above its fewest [n], in units of their divisor; that unit."""
    excess = problem.distortion - problem.distortion[problem.end - 1][problem.layer]
    extra = problem.cost - problem.cost[problem.start][problem.layer]
    unit = int(np.gcd.reduce(extra)) or 1
    return excess, extra // unit, unit


class Row(NamedTuple):
    """A constraint: the sum of `weight` [n] over the candidates taken is at most limit + tolerance."""

    weight: IntArray | FloatArray
    limit: float
    tolerance: float = 0.0


def minimise(
    problem: Problem,
    usable: IntArray,
    objective: FloatArray,
    rows: Sequence[Row],
    mip_rel_gap: float,
    time_limit: float | None,
) -> tuple[IntArray | None, float]:
    """Minimise `objective` [n] over one of the `usable` candidates a layer, within the rows.

    Returns positions [layers], None where HiGHS found none in time, and a lower bound on the objective.
    """
    variables, layers = usable.size, problem.start.size
    one_each = csr_array((np.ones(variables), (problem.layer[usable], np.arange(variables))), shape=(layers, variables))
    within = csr_array(np.stack([row.weight[usable].astype(np.float64) for row in rows]))
    limits = np.array([row.limit for row in rows], dtype=np.float64)
    options = {"mip_rel_gap": mip_rel_gap} | ({} if time_limit is None else {"time_limit": time_limit})
    bound = None
    while True:
        with _stdout_to_stderr():
            result = milp(
                objective[usable],
                integrality=np.ones(variables),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(one_each, 1, 1),
                    *(LinearConstraint(within[[at]], -np.inf, float(limit)) for at, limit in enumerate(limits)),
                ],
                options=options,
            )
        if bound is None:
            bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
        position = usable[:0] if result.x is None else usable[result.x > 0.5]
        if position.size != layers:
            return None, bound
        overrun = np.array([row.weight[position].sum() - limit for row, limit in zip(rows, limits)])
        if (overrun <= [row.tolerance for row in rows]).all():
            return position, bound
        limits -= overrun.clip(min=0)  # a variable may end at 1 - 1e-6 and count as 1


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS 1.12 prints a debugging line from C whatever its options say; keep it out of what a user pipes on."""
    try:
        flush = ctypes.CDLL(None).fflush
        flush(None)
        saved = os.dup(1)
        os.dup2(2, 1)
    except (OSError, TypeError, AttributeError):  # no C library by that name (Windows), or the streams are closed
        yield
        return
    try:
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)
