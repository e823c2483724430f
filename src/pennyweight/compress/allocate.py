"""From the candidates of all layers to a plan within the budget.

    plan = allocate(candidates, budget, overhead, "hull", rows={name: number of rows})

With times (latency.py), the plan also keeps to a latency.

Candidates come in steps, so a plan made of them alone leaves bytes unspent. `allocate` therefore divides one layer: a
fraction of its rows takes a richer candidate. That makes the linear relaxation of the knapsack (hull.py) a plan, up to
the bytes the division itself costs, and no undivided plan has less distortion than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BudgetError, PlanError, UnknownNameError
from .budget import time_text
from .contract import Candidate
from .dynamic_program import solve_dynamic
from .hull import frontier, relax, solve_hull
from .integer_program import solve_integer
from .knapsack import IntArray, Problem, Solution
from .latency import Times
from .plan import Choice, Plan, SplitChoice
from .two_budgets import LatencyError, solve_hull_within, solve_integer_within

SOLVERS: dict[str, Callable[..., Solution]] = {
    "hull": solve_hull,
    "dynamic": solve_dynamic,
    "integer": solve_integer,
}
#: Those that can plan bytes and time at once.
TIME_SOLVERS: dict[str, Callable[..., Solution]] = {"hull": solve_hull_within, "integer": solve_integer_within}

_SPLIT_HEADER_BYTES = 64  # header of the split and of its second blob, with room to spare
_FRONTIER_POINTS = 100


def solve(
    costs: Sequence[ArrayLike], distortions: Sequence[ArrayLike], budget: int, solver: str = "hull", **options: Any
) -> Solution:
    """Solve by name: "hull" (fast, near-optimal), "dynamic" (exact on bucketed bytes) or "integer" (exact, HiGHS).

    Arguments, options and errors are those of `solve_hull`, `solve_dynamic` and `solve_integer`; an unknown name raises
    UnknownNameError.
    """
    if solver not in SOLVERS:
        raise UnknownNameError("solver", solver, SOLVERS)
    return SOLVERS[solver](costs, distortions, budget, **options)


def allocate(
    candidates: Mapping[str, Sequence[Candidate]],
    budget: int | None,
    overhead: int,
    solver: str = "hull",
    *,
    rows: Mapping[str, int] | None = None,
    times: Times | None = None,
) -> Plan:
    """The plan of least total distortion whose predicted files fit the budget.

    candidates: by layer name. budget: bytes of all files, None for no limit. overhead: bytes in them that are not layer
    blobs. rows: how many rows the layers' matrices have; one of the layers named here may be divided over its rows,
    which spends the budget to within a row. The bytes of a divided layer are interpolated, with the row bitmap and a
    header added; entropy-coded blobs may come out slightly different, so whoever carries out the plan settles the
    number of rows on real bytes. times: what the candidates take, and what they may take together.

    Raises BudgetError naming the smallest reachable size or time, PlanError on a layer without candidates, a candidate
    whose bytes or distortion make no sense, or a solver without times; UnknownNameError on an unknown solver.
    """
    for name, offers in candidates.items():
        if not offers:
            raise PlanError(f"layer {name!r} has no candidate; allow it another method")
        for offer in offers:
            if not math.isfinite(offer.distortion) or offer.nbytes < 0:
                raise PlanError(
                    f"layer {name!r}: candidate {offer.label} cannot be planned: "
                    f"{offer.nbytes} bytes, distortion {offer.distortion}"
                )
    offers_of = list(candidates.values())
    costs = [np.array([o.nbytes for o in offers], dtype=np.int64) for offers in offers_of]
    distortions = [np.array([o.distortion for o in offers]) for offers in offers_of]
    taken = None if times is None else times.of(candidates)
    problem = Problem.build(costs, distortions, times=taken)
    available = int(problem.cost[problem.end - 1].sum()) if budget is None else budget - overhead
    if available < problem.smallest:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot be met: the smallest reachable is {overhead + problem.smallest:,}, "
            f"of which {overhead:,} are not layers; raise it or allow methods that go smaller"
        )
    if times is None or taken is None:
        solution = solve(costs, distortions, available, solver)
    else:
        solution = _solve_within(costs, distortions, taken, available, times, solver, budget)
    choice, division = solution.choice, None
    if rows:
        choice, division = _divide_best(problem, solution, available, candidates, rows, times)
    choices = {}
    for at, (name, offers) in enumerate(candidates.items()):
        offer = offers[choice[at]]
        choices[name] = Choice(offer.method, dict(offer.options), offer.nbytes, offer.distortion)
        if taken is not None:
            choices[name] = replace(choices[name], microseconds=float(taken[at][choice[at]]))
        if division is not None and division.layer == at:
            richer = offers[division.upper]
            choices[name] = replace(
                choices[name],
                nbytes=offer.nbytes + division.extra_bytes,
                distortion=offer.distortion + division.fraction * (richer.distortion - offer.distortion),
                split=SplitChoice(richer.method, dict(richer.options), division.fraction),
            )
            if taken is not None:
                more = (choices[name].microseconds or 0.0) + division.extra_time
                choices[name] = replace(choices[name], microseconds=more)
    plan = Plan(choices, budget, overhead, solver, frontier=_thin_frontier(costs, distortions, overhead))
    if times is not None:
        plan.latency, plan.latency_batch, plan.rest_microseconds = times.latency, times.batch, times.rest
    return plan


def _solve_within(
    costs: Sequence[ArrayLike],
    distortions: Sequence[ArrayLike],
    taken: Sequence[ArrayLike],
    available: int,
    times: Times,
    solver: str,
    budget: int | None,
) -> Solution:
    """`solve` within the latency, too."""
    if solver not in TIME_SOLVERS:
        if solver in SOLVERS:
            raise PlanError(f"the solver {solver!r} plans bytes only; with a latency take {' or '.join(TIME_SOLVERS)}")
        raise UnknownNameError("solver", solver, TIME_SOLVERS)
    try:
        return TIME_SOLVERS[solver](costs, distortions, taken, available, times.limit)
    except LatencyError as error:
        within = "" if budget is None else f" within {budget:,} bytes"
        raise BudgetError(
            f"a latency of {time_text(times.latency)} cannot be met: the smallest reachable{within} is "
            f"{time_text((error.least + times.rest) / 1e6)}, where the model as it was takes "
            f"{time_text(times.original / 1e6)}; raise it, or allow methods that run faster"
        ) from None


class _Division(NamedTuple):
    """`fraction` of the rows of `layer` takes candidate `upper`, for `extra_bytes` more (and `extra_time` microseconds)
    and `gain` less distortion."""

    layer: int
    upper: int
    fraction: float
    extra_bytes: int
    gain: float
    extra_time: float


def _divide_best(
    problem: Problem,
    solution: Solution,
    available: int,
    candidates: Mapping[str, Sequence[Candidate]],
    rows: Mapping[str, int],
    times: Times | None,
) -> tuple[IntArray, _Division | None]:
    """Divide a layer of the solver's choice or of the relaxation's, whichever ends with less distortion.

    The relaxation knows nothing of time, so with times only the solver's choice is divided.
    """
    n_rows = np.array([rows.get(name, 0) for name in candidates])
    # Both parts of a divided layer would carry what all rows share in full.
    by_rows = [[o.shared_nbytes == 0 for o in offers] for offers in candidates.values()]
    divisible = np.array([by_rows[layer][index] for layer, index in zip(problem.layer, problem.index)])
    divisible &= n_rows[problem.layer] > 0
    # Flat positions of the solver's choice: the one candidate of each layer with that index.
    solved = np.flatnonzero(problem.index == solution.choice[problem.layer])
    best, best_value = (solution.choice, None), math.inf
    spare, own_time = math.inf, np.zeros(len(n_rows))
    starts = [solved]
    if times is None:
        starts.append(relax(problem, available).position)
    else:
        spare = times.limit - problem.time_at(solved)
        own_time = np.array([times.division(name) for name in candidates])
    for position in starts:
        slack = available - problem.cost_at(position)
        division = _divide(problem, position, slack, spare, n_rows, own_time, divisible)
        value = problem.distortion_at(position) - (division.gain if division else 0.0)
        if value < best_value:
            best, best_value = (problem.index[position], division), value
    return best


def _divide(
    problem: Problem,
    position: IntArray,
    slack: int,
    spare: float,
    rows: IntArray,
    own_time: np.ndarray,
    divisible: np.ndarray,
) -> _Division | None:
    """The division that saves most; None if none is possible. It spends `slack` (or `spare`, the time) to within a row.

    own_time: [layers], what dividing a layer adds to its time.
    """
    current = position[problem.layer]
    dc = problem.cost - problem.cost[current]
    dd = problem.distortion - problem.distortion[current]
    dt = np.zeros(dd.size) if problem.time is None else problem.time - problem.time[current]
    fixed = -(-rows // 8) + _SPLIT_HEADER_BYTES
    spend = slack - fixed[problem.layer]
    left = spare - own_time[problem.layer]
    richer = np.flatnonzero((dd < 0) & ((dc > slack) | (dt > spare)) & (spend > 0) & divisible & divisible[current])
    richer = richer[left[richer] > 0]
    if richer.size == 0:
        return None
    n_rows = rows[problem.layer[richer]]
    with np.errstate(divide="ignore"):
        by_time = np.where(dt[richer] > 0, left[richer] / dt[richer].clip(min=0), math.inf)
        by_bytes = np.where(dc[richer] > 0, spend[richer] / dc[richer].clip(min=0), math.inf)
    most = np.minimum(np.minimum(by_bytes, by_time), (n_rows - 1) / n_rows)
    fraction = np.floor(most * n_rows) / n_rows
    gain = -dd[richer] * fraction
    best = int(np.argmax(gain))
    if fraction[best] == 0:
        return None
    at, share = richer[best], float(fraction[best])
    layer = int(problem.layer[at])
    extra_bytes = math.ceil(share * int(dc[at])) + int(fixed[layer])
    extra_time = share * float(dt[at]) + float(own_time[layer])
    return _Division(layer, int(problem.index[at]), share, extra_bytes, float(gain[best]), extra_time)


def _thin_frontier(
    costs: Sequence[IntArray], distortions: Sequence[ArrayLike], overhead: int
) -> list[tuple[int, float]]:
    """(total bytes, distortion) of at most `_FRONTIER_POINTS` plans, evenly spread over log bytes, largest first."""
    curve = frontier(costs, distortions)
    totals = curve.cost + overhead
    wanted = np.geomspace(max(totals[0], 1), max(totals[-1], 1), _FRONTIER_POINTS)
    points = np.unique(np.concatenate([[0, totals.size - 1], np.searchsorted(-totals, -wanted, side="right") - 1]))
    points = points[points >= 0][:_FRONTIER_POINTS]
    return [(int(totals[p]), float(curve.distortion[p])) for p in points]
