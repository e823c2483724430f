"""The learning rate of an arm: every arm starts from the same rates, and none ends at the edge of those it tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def tried_rates(
    train: Callable[[float], T], score: Callable[[T], float], ladder: Sequence[float], start: Sequence[float]
) -> dict[float, T]:
    """Learning rate -> what training at it gave, in rising order of the rates.

    All of `start` are tried; then, as long as the best score lies at the least or the greatest rate tried, the next one
    of `ladder` beyond it, until there is none. ladder: rising; holds the rates of `start`, which are neighbours in it.
    """
    found = {rate: train(rate) for rate in start}
    while True:
        best = ladder.index(best_rate(found, score))
        beyond = [ladder[at] for at in (best - 1, best + 1) if 0 <= at < len(ladder) and ladder[at] not in found]
        if not beyond:
            return {rate: found[rate] for rate in sorted(found)}
        found |= {rate: train(rate) for rate in beyond}


def best_rate(found: dict[float, T], score: Callable[[T], float]) -> float:
    """The rate of the highest score; of equals the lowest."""
    return max(sorted(found), key=lambda rate: score(found[rate]))


def at_the_edge(best: float, tried: Sequence[float]) -> bool:
    """Whether a better rate may lie beyond those tried."""
    return best in (min(tried), max(tried))
