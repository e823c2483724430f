"""The six overall metrics of BiBench: Benchmarking and Analyzing Network Binarization, arXiv 2301.11233.

Each track is the quadratic mean of ratios between a binarised network and its real-valued twin, so that methods can be
compared across tasks whose own figures differ in kind. With E the mean over the runs of one cell:

    learning task          sqrt( mean_tasks          E(A_bi / A)^2 )                          A: accuracy
    neural architecture    sqrt( mean_families       E(A_bi / A)^2 )                          CNN, transformer, MLP
    corruption robustness  sqrt( mean_corruptions    E(G / G_bi)^2 )                          G: accuracy lost
    training consumption   sqrt( [ E(T / T_bi)^2 + E(std A / std A_bi)^2 ] / 2 )              T: time of training
    theoretical complexity sqrt( [ E(r_c)^2 + E(r_s)^2 ] / 2 )
    hardware inference     sqrt( [ E(T / T_bi)^2 + E(S / S_bi)^2 ] / 2 )                      T: latency, S: bytes

r_c and r_s, how many times fewer bits and operations there are, come from the cost table (`pennyweight.cost`).

A twin compared with itself scores 1 on every track, and more is better on all of them.

Departures: ratios are plain numbers here, percentages in the paper. Quotients whose denominator can vanish (accuracy
lost, deviation of accuracies) have a floor below both terms, the smallest difference that the test set can show;
without it a network at chance, which has nothing to lose, would be infinitely robust.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean


def quadratic_mean(values: Iterable[float]) -> float:
    """sqrt(mean(v^2)): at least the mean, at most the largest. Raises ValueError on no values."""
    squares = [value * value for value in values]
    if not squares:
        raise ValueError("the quadratic mean of no values is not defined")
    return math.sqrt(fmean(squares))


def mean_ratio(over: Sequence[float], under: Sequence[float], floor: float = 0.0) -> float:
    """E(over / under), run by run, both terms at least `floor`. Raises ValueError unless there are as many of each."""
    if not over or len(over) != len(under):
        raise ValueError(f"{len(over)} numbers cannot be divided by {len(under)}, one by one")
    return fmean(max(a, floor) / max(b, floor) for a, b in zip(over, under))


def accuracy_score(cells: Mapping[str, tuple[Sequence[float], Sequence[float]]], floor: float = 0.0) -> float:
    """Tracks 1 and 2. cells: task (or family of architectures) -> accuracies (binarised, real), one per run. floor: of
    the real ones, above 0 where they may be 0."""
    return quadratic_mean(mean_ratio(binary, [max(a, floor) for a in real]) for binary, real in cells.values())


def robustness_score(cells: Mapping[str, tuple[Sequence[float], Sequence[float]]], floor: float) -> float:
    """Track 3. cells: corruption -> accuracy lost to it (binarised, real), one per run. floor: see the module."""
    return quadratic_mean(mean_ratio(real, binary, floor) for binary, real in cells.values())


def training_score(
    seconds: tuple[Sequence[float], Sequence[float]],
    deviations: tuple[Sequence[float], Sequence[float]],
    floor: float,
) -> float:
    """Track 4. seconds: (binarised, real) time of a step, one per run. deviations: (binarised, real), for each seed the
    standard deviation of accuracy over optimisers, learning rates and schedules. floor: of deviations."""
    return quadratic_mean((mean_ratio(seconds[1], seconds[0]), mean_ratio(deviations[1], deviations[0], floor)))


def complexity_score(compression: Sequence[float], speed_up: Sequence[float]) -> float:
    """Track 5, from r_c and r_s of each architecture."""
    return quadratic_mean((fmean(compression), fmean(speed_up)))


def inference_score(
    seconds: tuple[Sequence[float], Sequence[float]], nbytes: tuple[Sequence[float], Sequence[float]]
) -> float:
    """Track 6, from (binarised, real) latencies and bytes of each architecture. An architecture that cannot be deployed
    takes infinite time and bytes, which adds nothing."""
    return quadratic_mean((mean_ratio(seconds[1], seconds[0]), mean_ratio(nbytes[1], nbytes[0])))
