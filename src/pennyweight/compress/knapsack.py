"""The multiple-choice knapsack that every planner solves: a candidate a layer, bytes within a budget, least distortion.

    minimise  sum_l d_l[j_l]   subject to  sum_l c_l[j_l] <= budget
                               and, where candidates have times (two_budgets.py), sum_l t_l[j_l] <= latency

`Problem` checks the input once, drops the candidates that can never be best (another one of the layer is no larger, no
slower and no worse) and lays all layers end to end, so that the solvers work on flat arrays. A solver's state is
`position`, int64 [layers]: for every layer the flat index of the candidate it takes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BudgetError, PlanError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# Pairs of moves are compared in one table; this many of the most promising moves enter it.
_TABLE_MOVES = 512


class FractionalStep(NamedTuple):
    """The one layer that the linear relaxation splits: `fraction` of `upper`, the rest of `lower`."""

    layer: int
    lower: int
    upper: int
    fraction: float


@dataclass(frozen=True)
class Solution:
    """What a solver answers.

    choice: int64 [layers], index of the chosen candidate in the caller's arrays. cost: bytes. distortion: its sum.
    lower_bound: no choice within the limit can have a smaller objective (distortion; bytes for `smallest_cost`).
    fraction: the fractional step of the linear relaxation, None if it has none or the solver does not use it.
    """

    choice: IntArray
    cost: int
    distortion: float
    lower_bound: float
    fraction: FractionalStep | None = None


@dataclass(frozen=True)
class Problem:
    """Undominated candidates of all layers, layer after layer, each layer from small to large (so, without times, from
    bad to good).

    cost int64 [n], distortion float64 [n], layer int64 [n]; index int64 [n]: place in the caller's array of that layer;
    start int64 [layers]: where each layer begins; end int64 [layers]: one past its last. time: float64 [n] or None.
    """

    cost: IntArray
    distortion: FloatArray
    layer: IntArray
    index: IntArray
    start: IntArray
    end: IntArray
    time: FloatArray | None = None

    @classmethod
    def build(
        cls,
        costs: Sequence[ArrayLike],
        distortions: Sequence[ArrayLike],
        allowed: Sequence[ArrayLike] | None = None,
        times: Sequence[ArrayLike] | None = None,
    ) -> Problem:
        """Check and prune. `allowed`: one bool array a layer; False forbids a candidate (rd-prune's monotone rounds).

        Raises PlanError on layers without candidates, arrays that do not match, costs that are negative or no integers,
        distortions that are not finite and times that are not or are negative; the message counts layers and
        candidates from 0.
        """
        if len(costs) != len(distortions) or (allowed is not None and len(allowed) != len(costs)):
            raise PlanError(
                f"{len(costs)} layers have costs but {len(distortions)} have distortions; give one for each"
            )
        cost_of = [np.asarray(c) for c in costs]
        distortion_of = [np.asarray(d, dtype=np.float64) for d in distortions]
        for at, (c, d) in enumerate(zip(cost_of, distortion_of)):
            if c.ndim != 1 or c.shape != d.shape or c.size == 0:
                raise PlanError(
                    f"layer {at}: costs {c.shape} and distortions {d.shape} must be equally long, not empty"
                )
            if c.dtype.kind not in "iu":
                raise PlanError(f"layer {at}: costs are {c.dtype}; give whole bytes as integers")
        if not cost_of:
            raise PlanError("there is no layer to plan")
        sizes = np.array([c.size for c in cost_of], dtype=np.int64)
        layer = np.repeat(np.arange(sizes.size), sizes)
        index = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        cost = np.concatenate(cost_of).astype(np.int64)
        distortion = np.concatenate(distortion_of)
        time = np.zeros(distortion.size)
        if times is not None:
            if [np.shape(t) for t in times] != [c.shape for c in cost_of]:
                raise PlanError("every candidate needs a time, or none may have one")
            time = np.concatenate([np.asarray(t, dtype=np.float64) for t in times])
        for wrong, what, values in (
            (~np.isfinite(distortion), "distortion is {}, which is not finite", distortion),
            (cost < 0, "cost is {} bytes, which is negative", cost),
            (~(np.isfinite(time) & (time >= 0)), "time is {}, which makes no sense", time),
        ):
            if wrong.any():
                first = int(np.argmax(wrong))
                raise PlanError(f"layer {layer[first]}, candidate {index[first]}: {what.format(values[first])}")
        if allowed is not None:
            mask_of = [np.asarray(a, dtype=bool) for a in allowed]
            for at, mask in enumerate(mask_of):
                if mask.shape != cost_of[at].shape or not mask.any():
                    raise PlanError(
                        f"layer {at}: the mask of allowed candidates must fit its costs and allow at least one"
                    )
            mask = np.concatenate(mask_of)
            cost, distortion, time, layer, index = cost[mask], distortion[mask], time[mask], layer[mask], index[mask]
        return cls.sorted(cost, distortion, layer, index, None if times is None else time)

    @classmethod
    def sorted(
        cls, cost: IntArray, distortion: FloatArray, layer: IntArray, index: IntArray, time: FloatArray | None = None
    ) -> Problem:
        """From checked candidates in any order; every layer has one at least."""
        # By layer, then cost, then distortion: three stable sorts, several times as fast as np.lexsort.
        order = np.argsort(distortion, kind="stable")
        ascending = distortion[order]
        rank = np.empty(order.size, dtype=np.int64)
        rank[order] = np.concatenate([[0], np.cumsum(ascending[1:] > ascending[:-1])])
        order = order[np.argsort(cost[order], kind="stable")]
        order = order[np.argsort(layer[order].astype(np.min_scalar_type(int(layer.max()))), kind="stable")]
        cost, distortion, layer, index = cost[order], distortion[order], layer[order], index[order]
        if time is not None:
            problem = cls._assemble(cost, distortion, layer, index, time[order])
            return problem.only(~problem._dominated())
        # Keys of a later layer all lie below those of an earlier one, so the running minimum starts afresh in each.
        key = rank[order] - layer * (rank.size + 1)
        keep = np.ones(key.size, dtype=bool)
        keep[1:] = key[1:] < np.minimum.accumulate(key)[:-1]
        cost, distortion, layer, index = cost[keep], distortion[keep], layer[keep], index[keep]
        return cls._assemble(cost, distortion, layer, index)

    @classmethod
    def _assemble(
        cls, cost: IntArray, distortion: FloatArray, layer: IntArray, index: IntArray, time: FloatArray | None = None
    ) -> Problem:
        edges = np.searchsorted(layer, np.arange(layer[-1] + 2))
        return cls(cost, distortion, layer, index, edges[:-1], edges[1:], time)

    def _dominated(self) -> NDArray[np.bool_]:
        """[n]: whether an earlier candidate of the layer, so no larger one, is no worse and no slower."""
        assert self.time is not None
        found = np.zeros(self.cost.size, dtype=bool)
        for start, end in zip(self.start, self.end):
            d, t = self.distortion[start:end], self.time[start:end]
            found[start:end] = np.triu((d[:, None] <= d) & (t[:, None] <= t), 1).any(0)
        return found

    def only(self, keep: NDArray[np.bool_]) -> Problem:
        """The problem with fewer candidates; `keep` [n] must leave at least one a layer."""
        time = None if self.time is None else self.time[keep]
        return self._assemble(self.cost[keep], self.distortion[keep], self.layer[keep], self.index[keep], time)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest choice there is."""
        return int(self.cost[self.start].sum())

    def check_budget(self, budget: int) -> int:
        """The budget as an int; raises BudgetError that says the smallest reachable cost if it lies below that."""
        budget = operator.index(budget)
        if budget < self.smallest:
            raise BudgetError(
                f"a budget of {budget:,} bytes cannot be met: the smallest reachable is {self.smallest:,}"
            )
        return budget

    def cost_at(self, position: IntArray) -> int:
        return int(self.cost[position].sum())

    def time_at(self, position: IntArray) -> float:
        return 0.0 if self.time is None else float(self.time[position].sum())

    def distortion_at(self, position: IntArray) -> float:
        return float(self.distortion[position].sum())

    def solution(self, position: IntArray, lower_bound: float, fraction: FractionalStep | None = None) -> Solution:
        distortion = self.distortion_at(position)
        # The bound is summed in another order than the distortion; rounding must not put it above.
        bound = min(float(lower_bound), distortion)
        return Solution(self.index[position], self.cost_at(position), distortion, bound, fraction)


def improve(
    problem: Problem,
    position: IntArray,
    budget: int,
    slope: float,
    rounds: int = 50,
    *,
    latency: float = math.inf,
    price: float = 0.0,
) -> IntArray:
    """Spend what the budgets leave: the best single upgrade, or upgrade of one layer paid by another's downgrade.

    slope, price: distortion saved per byte and per unit of time at the margin, from the linear relaxation. With
    r = dd + slope * dc + price * dt for a move that changes a layer's bytes by dc, its time by dt and its distortion by
    dd, a pair of moves gains at most slope * slack + price * slack in time - r_1 - r_2, so moves with large r are left
    out. Each round applies the best pair; ends when none gains, or after `rounds`.
    """
    position = position.copy()
    time = np.zeros(problem.cost.size) if problem.time is None else problem.time
    for _ in range(rounds):
        slack, spare = budget - problem.cost_at(position), latency - problem.time_at(position)
        dc = problem.cost - problem.cost[position][problem.layer]
        dd = problem.distortion - problem.distortion[position][problem.layer]
        dt = time - time[position][problem.layer]
        reduced = dd + slope * dc + price * dt
        worth = slope * slack + (price * spare if price else 0.0)
        usable = reduced + min(float(reduced.min()), 0.0) < worth
        up = _most_promising(np.flatnonzero(usable & (dd < 0)), reduced)
        down = _most_promising(np.flatnonzero(usable & (dd > 0)), reduced)
        if up.size == 0:
            break
        gain = -dd[up, None] - np.concatenate([[0.0], dd[down]])  # column 0: no downgrade needed
        freed, saved = np.concatenate([[0], -dc[down]]), np.concatenate([[0.0], -dt[down]])
        down_layer = np.concatenate([[-1], problem.layer[down]])
        possible = (dc[up, None] - freed <= slack) & (problem.layer[up, None] != down_layer)
        if latency < math.inf:
            possible &= dt[up, None] - saved <= spare
        gain[~possible] = 0.0
        row, column = np.unravel_index(int(np.argmax(gain)), gain.shape)
        # Gains at the level of rounding could be taken back and forth for ever.
        if gain[row, column] <= 1e-12 * abs(dd[up[row]]):
            break
        position[problem.layer[up[row]]] = up[row]
        if column > 0:
            position[problem.layer[down[column - 1]]] = down[column - 1]
    return position


def _most_promising(moves: IntArray, reduced: FloatArray) -> IntArray:
    """At most `_TABLE_MOVES` of the moves, those with the smallest reduced cost."""
    if moves.size <= _TABLE_MOVES:
        return moves
    return np.sort(moves[np.argsort(reduced[moves], kind="stable")[:_TABLE_MOVES]])
