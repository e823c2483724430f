"""The three solvers of the multiple-choice knapsack: against brute force, against each other, against the cards."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pennyweight.compress.allocate import SOLVERS, solve
from pennyweight.compress.dynamic_program import solve_dynamic
from pennyweight.compress.hull import frontier, relax, solve_hull
from pennyweight.compress.integer_program import smallest_cost, solve_integer
from pennyweight.compress.knapsack import Problem, improve
from pennyweight.errors import BudgetError, PlanError, UnknownNameError

EXACT = ("dynamic", "integer")


@st.composite
def instances(draw, max_layers: int = 4, max_candidates: int = 5):
    """Costs and distortions of a few layers (ties, dominated ones, negative distortions), and a budget."""
    sizes = draw(st.lists(st.integers(1, max_candidates), min_size=1, max_size=max_layers))
    costs = [np.array(draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))) for n in sizes]
    # Quarters add without rounding, so brute force and solvers can be compared for equality.
    quarters = st.integers(-4, 100).map(lambda n: n / 4)
    distortions = [np.array(draw(st.lists(quarters, min_size=n, max_size=n))) for n in sizes]
    low, high = sum(int(c.min()) for c in costs), sum(int(c.max()) for c in costs)
    return costs, distortions, draw(st.integers(low, high + 3))


def all_choices(costs, distortions):
    for choice in itertools.product(*(range(len(c)) for c in costs)):
        yield (
            choice,
            sum(int(c[j]) for c, j in zip(costs, choice)),
            sum(float(d[j]) for d, j in zip(distortions, choice)),
        )


def optimum(costs, distortions, budget) -> float:
    return min(d for _, c, d in all_choices(costs, distortions) if c <= budget)


def layered_instance(layers: int, candidates: int, seed: int = 0):
    """Sizes and rate-distortion curves like those of a network: distortion falls exponentially with bits."""
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(9, 1, (layers, 1))
    bits = np.sort(rng.uniform(1, 8, (layers, candidates)), axis=1)
    scale = weights * rng.lognormal(0, 1, (layers, 1))
    distortion = scale * np.exp(-1.4 * bits) * rng.lognormal(0, 0.3, (layers, candidates))
    return list((weights * bits / 8).astype(np.int64)), list(distortion), int(weights.sum() * 3 / 8)


@pytest.mark.parametrize("solver", EXACT)
@settings(deadline=None, max_examples=50)
@given(instance=instances())
def test_exact_solvers_equal_brute_force(solver, instance):
    costs, distortions, budget = instance
    solution = solve(costs, distortions, budget, solver)
    assert solution.distortion == optimum(costs, distortions, budget)
    assert solution.cost <= budget
    assert solution.cost == sum(int(c[j]) for c, j in zip(costs, solution.choice))


@settings(deadline=None, max_examples=50)
@given(instance=instances())
def test_hull_stays_within_one_fractional_step_of_the_optimum(instance):
    costs, distortions, budget = instance
    solution = solve_hull(costs, distortions, budget)
    best = optimum(costs, distortions, budget)
    assert solution.cost <= budget
    assert solution.lower_bound <= best + 1e-9
    assert best <= solution.distortion
    if solution.fraction is None:
        assert solution.distortion == best
    else:
        layer, lower, upper, fraction = solution.fraction
        assert 0 <= fraction < 1
        step = distortions[layer][lower] - distortions[layer][upper]
        assert solution.distortion - solution.lower_bound <= fraction * step + 1e-9


@settings(deadline=None, max_examples=40)
@given(instance=instances())
def test_lower_bound_is_the_linear_optimum(instance):
    """Against Lagrangian duality: the LP equals the max over prices of sum_l min_j (d + price * c) - price * budget.

    The maximum lies at price 0 or at the slope between two candidates of a layer.
    """
    costs, distortions, budget = instance
    slopes = {0.0}
    for c, d in zip(costs, distortions):
        for a, b in itertools.permutations(range(len(c)), 2):
            if c[b] > c[a] and d[a] > d[b]:
                slopes.add(float((d[a] - d[b]) / (c[b] - c[a])))
    dual = max(sum(float((d + s * c).min()) for c, d in zip(costs, distortions)) - s * budget for s in slopes)
    bound = solve_hull(costs, distortions, budget).lower_bound
    assert bound == pytest.approx(dual, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(instance=instances(), buckets=st.integers(1, 12))
def test_bucketed_program_never_exceeds_the_budget(instance, buckets):
    costs, distortions, budget = instance
    solution = solve_dynamic(costs, distortions, budget, buckets=buckets)
    assert solution.cost <= budget
    assert solution.lower_bound <= optimum(costs, distortions, budget) + 1e-9 <= solution.distortion + 2e-9


@pytest.mark.parametrize("buckets", [5, 50, 500])
def test_coarse_buckets_hold_the_budget_and_are_no_worse_than_the_hull(buckets):
    costs, distortions, budget = layered_instance(60, 30)
    solution = solve_dynamic(costs, distortions, budget, buckets=buckets)
    assert solution.cost <= budget
    assert solution.distortion <= solve_hull(costs, distortions, budget).distortion


def test_improvement_trades_between_layers_and_never_within_one():
    """One layer alone cannot pay for its own upgrade; another layer's cheap downgrade can."""
    alone = Problem.build([[0, 10, 30]], [[60.0, 50.0, 0.0]])
    assert improve(alone, np.array([1]), 25, slope=2.0, rounds=1).tolist() == [1]
    both = Problem.build([[0, 10, 30], [0, 10]], [[60.0, 50.0, 0.0], [1.0, 0.0]])
    assert improve(both, np.array([1, 4]), 35, slope=2.0).tolist() == [2, 3]


@pytest.mark.parametrize("solver", SOLVERS)
@settings(deadline=None, max_examples=40)
@given(instance=instances(), data=st.data())
def test_order_of_layers_and_candidates_does_not_matter(solver, instance, data):
    costs, distortions, budget = instance
    before = solve(costs, distortions, budget, solver)
    layers = data.draw(st.permutations(range(len(costs))))
    inner = {at: data.draw(st.permutations(range(len(costs[at])))) for at in layers}
    after = solve(
        [costs[at][inner[at]] for at in layers], [distortions[at][inner[at]] for at in layers], budget, solver
    )
    assert after.lower_bound == pytest.approx(before.lower_bound, abs=1e-9)
    if solver in EXACT:
        assert after.distortion == before.distortion


@pytest.mark.parametrize("solver", EXACT)
@settings(deadline=None, max_examples=40)
@given(instance=instances(), more=st.integers(0, 20))
def test_a_larger_budget_is_never_worse(solver, instance, more):
    costs, distortions, budget = instance
    smaller, larger = (solve(costs, distortions, b, solver).distortion for b in (budget, budget + more))
    assert larger <= smaller


@settings(deadline=None, max_examples=40)
@given(instance=instances(), data=st.data())
def test_smallest_cost_equals_brute_force(instance, data):
    costs, distortions, _ = instance
    choices = list(all_choices(costs, distortions))
    limit = data.draw(st.sampled_from(sorted({d for _, _, d in choices})))
    solution = smallest_cost(costs, distortions, limit)
    assert solution.distortion <= limit
    assert solution.cost == min(c for _, c, d in choices if d <= limit)
    assert solution.lower_bound <= solution.cost
    below = min(d for _, _, d in choices) - 0.25
    with pytest.raises(BudgetError, match="least reachable"):
        smallest_cost(costs, distortions, below)


@pytest.mark.parametrize("solver", SOLVERS)
@settings(deadline=None, max_examples=25)
@given(instance=instances(), data=st.data())
def test_forbidden_candidates_are_not_chosen(solver, instance, data):
    costs, distortions, budget = instance
    allowed = [np.array(data.draw(st.lists(st.booleans(), min_size=len(c), max_size=len(c)))) for c in costs]
    assume(all(a.any() for a in allowed))
    assume(sum(int(c[a].min()) for c, a in zip(costs, allowed)) <= budget)
    solution = solve(costs, distortions, budget, solver, allowed=allowed)
    assert all(a[j] for a, j in zip(allowed, solution.choice))
    if solver in EXACT:
        rest = [c[a] for c, a in zip(costs, allowed)], [d[a] for d, a in zip(distortions, allowed)]
        assert solution.distortion == optimum(*rest, budget)


@settings(deadline=None, max_examples=40)
@given(instance=instances())
def test_frontier_passes_through_real_choices_and_every_lp_optimum(instance):
    costs, distortions, _ = instance
    curve = frontier(costs, distortions)
    assert curve.cost[-1] == sum(int(c.min()) for c in costs)
    assert curve.distortion[0] == sum(float(d.min()) for d in distortions)
    assert (np.diff(curve.cost) < 0).all() and (np.diff(curve.distortion) > 0).all()
    for point in range(curve.cost.size):
        choice = curve.choice(point)
        assert curve.cost[point] == sum(int(c[j]) for c, j in zip(costs, choice))
        assert curve.distortion[point] == pytest.approx(sum(float(d[j]) for d, j in zip(distortions, choice)), abs=1e-9)
        problem = Problem.build(costs, distortions)
        assert relax(problem, int(curve.cost[point])).bound == pytest.approx(curve.distortion[point], abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("second", "choice", "value"), [((0, 2, 5), (1, 1), 3.0), ((0, 6, 6.5), (0, 2), 6.5)], ids=["interior", "corner"]
)
def test_worked_example_of_rd_prune(solver, second, choice, value):
    """Layers of 4 and 8 weights, amounts 0, 1/2, 1 pruned, at most 6 kept."""
    solution = solve([[4, 2, 0], [8, 4, 0]], [[0, 1, 10], second], 6, solver)
    assert solution.distortion == value
    assert tuple(solution.choice) == choice


@pytest.mark.parametrize("solver", SOLVERS)
def test_worked_example_of_adaquant(solver):
    """8 or 4 bits for layers of 100, 300, 200 and 400 weights; 75 % of the 8-bit size: layers 1 and 2 get 4 bits."""
    sizes, losses = (100, 300, 200, 400), (0.5, 0.9, 0.1, 2.0)
    costs, distortions = [[8 * n, 4 * n] for n in sizes], [[0.0, loss] for loss in losses]
    solution = solve(costs, distortions, 6000, solver)
    assert tuple(solution.choice) == (0, 1, 1, 0)
    assert (solution.cost, solution.distortion) == (6000, 1.0)
    assert smallest_cost(costs, distortions, 1.0).cost == 6000
    assert solve(costs, distortions, 8000, solver).distortion == 0
    with pytest.raises(BudgetError, match="4,000"):
        solve(costs, distortions, 3999, solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_layer_larger_than_the_whole_budget(solver):
    solution = solve([[1000, 0], [3, 1]], [[0.0, 5.0], [0.0, 1.0]], 3, solver)
    assert tuple(solution.choice) == (1, 0)


def test_solvers_agree_on_a_network_sized_instance():
    costs, distortions, budget = layered_instance(60, 30)
    hull, integer = solve_hull(costs, distortions, budget), solve_integer(costs, distortions, budget)
    dynamic = solve_dynamic(costs, distortions, budget)
    for solution in (hull, dynamic, integer):
        assert solution.cost <= budget
        assert integer.distortion <= solution.distortion <= 1.005 * integer.distortion
    assert hull.lower_bound <= integer.lower_bound <= integer.distortion
    # mip_rel_gap counts distortion above the least possible, which is at most all of it.
    assert integer.distortion - integer.lower_bound <= 2e-6 * integer.distortion
    assert budget - hull.cost <= 1e-3 * budget


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_integer_program_is_exact_at_any_scale_of_distortion(scale):
    costs, distortions, budget = layered_instance(6, 5)
    scaled = [scale * d for d in distortions]
    assert solve_integer(costs, scaled, budget).distortion == pytest.approx(optimum(costs, scaled, budget), rel=1e-9)


def test_same_input_same_answer_and_nothing_on_stdout(capfd):
    costs, distortions, budget = layered_instance(120, 30, seed=3)
    for solver in SOLVERS:
        first, second = (solve(costs, distortions, budget, solver) for _ in range(2))
        assert (first.choice == second.choice).all()
    assert capfd.readouterr().out == ""


def test_time_limit_returns_the_best_known_choice():
    costs, distortions, budget = layered_instance(200, 40)
    hull = solve_hull(costs, distortions, budget)
    solution = solve_integer(costs, distortions, budget, time_limit=0.0)
    assert solution.cost <= budget and solution.distortion <= hull.distortion


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("costs", "distortions", "message"),
    [
        ([[1], [1, 2]], [[0.0], [0.0, math.nan]], "layer 1, candidate 1: distortion is nan"),
        ([[1, 2]], [[0.0, math.inf]], "not finite"),
        ([[1, -2]], [[0.0, 1.0]], "layer 0, candidate 1: cost is -2"),
        ([[1.5]], [[0.0]], "whole bytes"),
        ([[1, 2]], [[0.0]], "equally long"),
        ([[]], [[]], "not empty"),
        ([[1]], [], "give one for each"),
        ([], [], "no layer"),
    ],
)
def test_bad_input_is_refused(solver, costs, distortions, message):
    with pytest.raises(PlanError, match=message):
        solve(costs, distortions, 10, solver)


def test_mask_that_allows_nothing_and_unknown_solver_are_refused():
    with pytest.raises(PlanError, match="layer 0: the mask"):
        solve_dynamic([[1, 2]], [[1.0, 0.0]], 5, allowed=[[False, False]])
    with pytest.raises(UnknownNameError, match="'hull'"):
        solve([[1]], [[0.0]], 1, "hul")
