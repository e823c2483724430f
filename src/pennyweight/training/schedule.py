"""What changes in the course of training: annealed estimators, delayed binarisation, frozen parameters.

Everything that is scheduled is a function of one number, the progress: 0 at the start, 1 at the end. Modules keep it in
a buffer named `progress`, so that a checkpoint of the model alone computes the same; a `Schedule` counts the
optimizer's steps and writes it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import PlanError

PROGRESS = "progress"


def set_progress(model: nn.Module, value: float) -> None:
    """Write `value` into every buffer named `progress` of the model. Raises ValueError outside of 0..1."""
    if not 0 <= value <= 1:
        raise ValueError(f"the progress of training lies between 0 and 1, not at {value}")
    for module in model.modules():
        buffer = module._buffers.get(PROGRESS)
        if buffer is not None:
            buffer.fill_(value)


class Schedule:
    """Progress and freezing by optimizer steps: call `step()` after each that was taken (skipped ones of AMP are not).

    steps: of the whole training, at least 1. anneal: the shares of the training between which the progress goes from 0
    to 1. freeze: glob over parameter names -> progress of the whole training from which they do not learn; their
    `requires_grad` is taken away and their gradient dropped, so that no optimizer touches them.
    Raises `PlanError` on shares outside of 0..1 and on patterns that match nothing. The model starts at progress 0.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        anneal: tuple[float, float] = (0.0, 1.0),
        freeze: Mapping[str, float] | None = None,
    ) -> None:
        if steps < 1:
            raise PlanError(f"a schedule needs at least one step, not {steps}")
        if not 0 <= anneal[0] < anneal[1] <= 1:
            raise PlanError(f"anneal is {anneal}; it must be two rising shares of the training, within 0 to 1")
        self.model, self.steps, self.anneal = model, steps, (float(anneal[0]), float(anneal[1]))
        self.freeze = dict(freeze or {})
        names = [name for name, _ in model.named_parameters()]
        for pattern, share in self.freeze.items():
            if not 0 <= share <= 1:
                raise PlanError(f"{pattern!r} is frozen at {share}; it must be a share of the training, 0 to 1")
            if not fnmatch.filter(names, pattern):
                raise PlanError(f"freeze: no parameter matches {pattern!r}; there are: {', '.join(names)}")
        self.taken = 0
        self._apply()

    @property
    def progress(self) -> float:
        """Of the annealing, 0 to 1."""
        first, last = self.anneal
        return min(max((self.taken / self.steps - first) / (last - first), 0.0), 1.0)

    def step(self) -> None:
        """One more step of the optimizer was taken. Beyond the last one nothing changes."""
        self.taken = min(self.taken + 1, self.steps)
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"taken": self.taken, "steps": self.steps, "anneal": list(self.anneal), "freeze": dict(self.freeze)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stood. Raises `PlanError` if that one had other settings, naming the first."""
        own = self.state_dict()
        for key in ("steps", "anneal", "freeze"):
            if state.get(key) != own[key]:
                raise PlanError(
                    f"the checkpoint's schedule has {key} {state.get(key)!r}, this one {own[key]!r}; resume with the "
                    "recipe it was trained by"
                )
        self.taken = int(state["taken"])
        self._apply()

    def _apply(self) -> None:
        set_progress(self.model, self.progress)
        due = [pattern for pattern, share in self.freeze.items() if self.taken >= share * self.steps]
        for name, parameter in self.model.named_parameters():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in due):
                parameter.requires_grad_(False)
                parameter.grad = None
