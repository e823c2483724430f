"""The learning rate as a function of the step, so that nothing of it needs to be stored."""

from __future__ import annotations

import math

from .settings import ScheduleSettings


def learning_rate_factor(step: int, steps: int, schedule: ScheduleSettings) -> float:
    """Share of the base rate at step 0..steps-1 of a stage.

    Warm-up over the first W = round(warmup * steps) steps: (step + 1) / W. Then, with t = (step - W) / (steps - W),
    cosine: floor + (1 - floor) (1 + cos(pi t)) / 2; linear: floor + (1 - floor) (1 - t); constant: 1.
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    t = (step - warmup) / (steps - warmup)
    falling = (1 + math.cos(math.pi * t)) / 2 if schedule.name == "cosine" else 1 - t
    return schedule.floor + (1 - schedule.floor) * falling
