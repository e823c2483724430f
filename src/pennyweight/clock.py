"""Wall time of things that take micro- to milliseconds, compared on a machine that others use, too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.inference_mode()
def median_seconds(
    runs: Sequence[Callable[[], Any]],
    repeats: int,
    warm_up: int = 2,
    patience: float | None = None,
    again: bool = False,
) -> list[float]:
    """Median wall time of each of `runs`, taken in turn so that a busy moment of the machine falls on all of them.

    The first `warm_up` rounds do not count. patience: seconds after which no further round begins, though at least five
    rounds (or `repeats`, if fewer) are measured. again: each run is made twice and the second one timed, so that what
    ran in between has not emptied the caches of its code and data.
    """
    times: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    for done in range(warm_up + repeats):
        if patience is not None and done >= warm_up + 5 and time.perf_counter() - started > patience:
            break
        for run, taken in zip(runs, times):
            if again:
                run()
            before = time.perf_counter()
            run()
            taken.append(time.perf_counter() - before)
    return [statistics.median(taken[warm_up:]) for taken in times]
