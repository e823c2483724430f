"""Penalties of a recipe: what is added to the task's loss for the weights themselves.

    penalties:
      - {method: p-norm, strength: 1e-5, p: 1}                      # loss + 1e-5 sum |w|
      - {method: path-norm, strength: 1e-3, schedule: [[0, 0], [0.2, 1]]}
      - {name: head, method: p-norm, strength: 1e-4, p: 2, match: ["head.*"]}

`method` is a penalty registered under `losses`; what is no key of this file is an option of it. The gradient passes
through the optimizer, its moments and clipping: coupled decay, where `around: [{method: pwd}]` is decoupled.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import registry
from ..errors import PlanError, UnknownNameError
from ..losses.base import Penalty


class _Entry(NamedTuple):
    """strength is multiplied by the factor that lies on the line through points (share of all steps, factor)."""

    name: str
    penalty: Penalty
    strength: float
    points: list[tuple[float, float]]

    def strength_at(self, share: float) -> float:
        shares, factors = zip(*self.points)
        return self.strength * float(np.interp(share, shares, factors))


class Penalties:
    """All of a recipe.

    entries: mappings with method, strength, and perhaps name (the method's, unless told) and schedule: points
    [share of all steps, factor of the strength] with straight lines between and constant outside; always 1 without.
    Raises `UnknownNameError` for methods there are not, `PlanError` for options they refuse, a strength or schedule
    that makes no sense, and names given twice.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._entries = [_entry(entry) for entry in entries]
        names = self.names
        for name in names:
            if names.count(name) > 1:
                raise PlanError(f"two penalties are called {name!r}; give each a name: of its own")

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._entries]

    def __call__(self, model: nn.Module, share: float) -> dict[str, Tensor]:
        """Name -> scalar to add to the loss, strength included. share: of all steps that were taken, 0 to 1."""
        found = {}
        for entry in self._entries:
            strength = entry.strength_at(share)
            found[entry.name] = strength * entry.penalty(model) if strength else torch.zeros(())
        return found

    @torch.no_grad()
    def try_out(self, model: nn.Module) -> None:
        """Raise `PlanError`, naming the penalty, if the model has none of that kind."""
        for entry in self._entries:
            try:
                value = entry.penalty(model)
            except PlanError as error:
                raise PlanError(f"penalty {entry.name}: {error}") from None
            if not bool(torch.isfinite(value)):
                raise PlanError(f"penalty {entry.name} is {float(value)} before training; look at the model's weights")


def _entry(source: Mapping[str, Any]) -> _Entry:
    options = dict(source)
    method = options.pop("method", None)
    known = {
        entry.name: entry.target
        for entry in registry.methods("losses")
        if inspect.isclass(entry.target) and issubclass(entry.target, Penalty)
    }
    if method not in known:
        raise UnknownNameError("penalty", str(method), known)
    name = str(options.pop("name", method))
    strength, points = _strength(name, options.pop("strength", None)), _points(name, options.pop("schedule", None))
    try:
        return _Entry(name, known[method](**options), strength, points)
    except TypeError as error:
        raise PlanError(f"penalty {name}: {error}") from None


def _strength(name: str, value: Any) -> float:
    try:
        strength = float(value)
    except (TypeError, ValueError):
        strength = -1.0
    if not 0 <= strength < float("inf"):
        raise PlanError(f"penalty {name}: strength is {value!r}; give a factor of the penalty, 0 or more")
    return strength


def _points(name: str, source: Any) -> list[tuple[float, float]]:
    if source is None:
        return [(0.0, 1.0)]
    try:
        points = [(float(share), float(factor)) for share, factor in source]
    except (TypeError, ValueError):
        points = []
    rising = all(before[0] < after[0] for before, after in pairwise(points))
    if not points or not rising or not all(0 <= share <= 1 and factor >= 0 for share, factor in points):
        raise PlanError(
            f"penalty {name}: schedule is {source!r}; give points [share of the training, factor], such as "
            "[[0, 0], [0.2, 1]], shares rising within 0 to 1"
        )
    return points
