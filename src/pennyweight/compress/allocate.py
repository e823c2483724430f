"""From the candidates of all layers to a plan within the budget.

    plan = allocate(candidates, budget, overhead, "hull", rows={name: number of rows})

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
from .contract import Candidate
from .dynamic_program import solve_dynamic
from .hull import frontier, relax, solve_hull
from .integer_program import solve_integer
from .knapsack import IntArray, Problem, Solution
from .plan import Choice, Plan, SplitChoice

SOLVERS: dict[str, Callable[..., Solution]] = {
    "hull": solve_hull,
    "dynamic": solve_dynamic,
    "integer": solve_integer,
}

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
) -> Plan:
    """The plan of least total distortion whose predicted files fit the budget.

    candidates: by layer name. budget: bytes of all files, None for no limit. overhead: bytes in them that are not layer
    blobs. rows: how many rows the layers' matrices have; one of the layers named here may be divided over its rows,
    which spends the budget to within a row. The bytes of a divided layer are interpolated, with the row bitmap and a
    header added; entropy-coded blobs may come out slightly different, so whoever carries out the plan settles the
    number of rows on real bytes.

    Raises BudgetError naming the smallest reachable size, PlanError on a layer without candidates or a candidate whose
    bytes or distortion make no sense, UnknownNameError on an unknown solver.
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
    problem = Problem.build(costs, distortions)
    available = int(problem.cost[problem.end - 1].sum()) if budget is None else budget - overhead
    if available < problem.smallest:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot be met: the smallest reachable is {overhead + problem.smallest:,}, "
            f"of which {overhead:,} are not layers; raise it or allow methods that go smaller"
        )
    solution = solve(costs, distortions, available, solver)
    choice, division = solution.choice, None
    if rows:
        choice, division = _divide_best(problem, solution, available, candidates, rows)
    choices = {}
    for at, (name, offers) in enumerate(candidates.items()):
        offer = offers[choice[at]]
        choices[name] = Choice(offer.method, dict(offer.options), offer.nbytes, offer.distortion)
        if division is not None and division.layer == at:
            richer = offers[division.upper]
            choices[name] = replace(
                choices[name],
                nbytes=offer.nbytes + division.extra_bytes,
                distortion=offer.distortion + division.fraction * (richer.distortion - offer.distortion),
                split=SplitChoice(richer.method, dict(richer.options), division.fraction),
            )
    return Plan(choices, budget, overhead, solver, frontier=_thin_frontier(costs, distortions, overhead))


class _Division(NamedTuple):
    """`fraction` of the rows of `layer` takes candidate `upper`, for `extra_bytes` more and `gain` less distortion."""

    layer: int
    upper: int
    fraction: float
    extra_bytes: int
    gain: float


def _divide_best(
    problem: Problem,
    solution: Solution,
    available: int,
    candidates: Mapping[str, Sequence[Candidate]],
    rows: Mapping[str, int],
) -> tuple[IntArray, _Division | None]:
    """Divide a layer of the solver's choice or of the relaxation's, whichever ends with less distortion."""
    n_rows = np.array([rows.get(name, 0) for name in candidates])
    # Both parts of a divided layer would carry what all rows share in full.
    by_rows = [[o.shared_nbytes == 0 for o in offers] for offers in candidates.values()]
    divisible = np.array([by_rows[layer][index] for layer, index in zip(problem.layer, problem.index)])
    divisible &= n_rows[problem.layer] > 0
    # Flat positions of the solver's choice: the one candidate of each layer with that index.
    solved = np.flatnonzero(problem.index == solution.choice[problem.layer])
    best, best_value = (solution.choice, None), math.inf
    for position in (solved, relax(problem, available).position):
        division = _divide(problem, position, available - problem.cost_at(position), n_rows, divisible)
        value = problem.distortion_at(position) - (division.gain if division else 0.0)
        if value < best_value:
            best, best_value = (problem.index[position], division), value
    return best


def _divide(
    problem: Problem, position: IntArray, slack: int, rows: IntArray, divisible: np.ndarray
) -> _Division | None:
    """The division that saves most; None if none is possible. It spends `slack` to within a row."""
    current = position[problem.layer]
    dc = problem.cost - problem.cost[current]
    dd = problem.distortion - problem.distortion[current]
    fixed = -(-rows // 8) + _SPLIT_HEADER_BYTES
    spend = slack - fixed[problem.layer]
    richer = np.flatnonzero((dd < 0) & (dc > slack) & (spend > 0) & divisible & divisible[current])
    if richer.size == 0:
        return None
    n_rows = rows[problem.layer[richer]]
    fraction = np.floor(spend[richer] / dc[richer] * n_rows) / n_rows
    gain = -dd[richer] * fraction
    best = int(np.argmax(gain))
    if fraction[best] == 0:
        return None
    at, share = richer[best], float(fraction[best])
    layer = int(problem.layer[at])
    extra_bytes = math.ceil(share * int(dc[at])) + int(fixed[layer])
    return _Division(layer, int(problem.index[at]), share, extra_bytes, float(gain[best]))


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
