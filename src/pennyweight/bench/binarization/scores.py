"""Score cards: what the results of all runs say of each method, on each of the six tracks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

from . import metrics
from .architectures import architecture
from .runs import REAL, Deployment, Run, Training

TRACKS = {
    "task": "Learning task",
    "architecture": "Neural architecture",
    "robustness": "Corruption robustness",
    "training": "Training consumption",
    "complexity": "Theoretical complexity",
    "inference": "Hardware inference",
}

Result = Mapping[str, Any]
Results = Mapping[Run, Result]


@dataclass(frozen=True)
class Card:
    """One method.

    scores: by the keys of TRACKS; None where the track was not run. accuracy: by task, families: by family of
    architectures, lost: by corruption, each the mean over runs. seconds: of a training step, deviation: of accuracies,
    over the settings of the training track. deployed: by architecture, what `runs.Deployment` finds. refused: "network:
    reason" of each thing the method could not do.
    """

    method: str
    scores: dict[str, float | None]
    accuracy: dict[str, float]
    families: dict[str, float]
    lost: dict[str, float]
    seconds: float | None
    deviation: float | None
    deployed: dict[str, dict[str, Any]]
    refused: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Pair:
    """A training and its result beside its real twin's."""

    run: Training
    own: Result
    real: Result

    def both(self, value: Callable[[Result], float]) -> tuple[float, float]:
        return value(self.own), value(self.real)


def make_card(method: str, results: Results) -> Card:
    """The card of a method, from those of its runs whose real twin has run, too."""
    pairs = [
        _Pair(run, own, results[replace(run, method=REAL)])
        for run, own in results.items()
        if isinstance(run, Training) and run.method == method and replace(run, method=REAL) in results
    ]
    deployed = {r.architecture: dict(v) for r, v in results.items() if isinstance(r, Deployment) and r.method == method}
    judged = [pair for pair in pairs if pair.run.track != "consumption"]
    settings = [pair for pair in pairs if pair.run.track == "consumption"]
    by_task = _grouped(judged, lambda run: run.task if run.track == "task" else None)
    by_family = _grouped(judged, lambda run: architecture(run.architecture).family)
    corrupted = [pair for pair in judged if pair.run.severities]
    served = [pair.own for pair in settings if "refused" not in pair.own]
    return Card(
        method,
        {
            "task": _accuracy_score(by_task),
            "architecture": _accuracy_score(by_family),
            "robustness": _robustness_score(corrupted),
            "training": _training_score(settings),
            "complexity": _complexity_score(deployed.values()),
            "inference": _inference_score(deployed.values(), method == REAL),
        },
        accuracy={name: fmean(_accuracy(pair.own) for pair in group) for name, group in by_task.items()},
        families={name: fmean(_accuracy(pair.own) for pair in group) for name, group in by_family.items()},
        lost={kind: fmean(_lost(pair.own, kind) for pair in corrupted) for kind in _kinds(corrupted)},
        seconds=fmean(result["seconds"] for result in served) if served else None,
        deviation=stdev(_accuracy(result) for result in served) if len(served) > 1 else None,
        deployed=deployed,
        refused=_reasons(pairs, deployed),
    )


def _grouped(pairs: Iterable[_Pair], key: Callable[[Training], str | None]) -> dict[str, list[_Pair]]:
    groups: dict[str, list[_Pair]] = {}
    for pair in pairs:
        name = key(pair.run)
        if name is not None:
            groups.setdefault(name, []).append(pair)
    return groups


def _columns(pairs: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    own, real = zip(*pairs)
    return list(own), list(real)


# A network that a method cannot make knows nothing, loses all to a corruption and takes for ever.


def _accuracy(result: Result) -> float:
    return 0.0 if "refused" in result else result["accuracy"]


def _lost(result: Result, kind: str) -> float:
    return 1.0 if "refused" in result else result["accuracy"] - result["corruptions"][kind]


def _seconds(result: Result) -> float:
    return math.inf if "refused" in result else result["seconds"]


def _accuracy_score(groups: Mapping[str, Sequence[_Pair]]) -> float | None:
    if not groups:
        return None
    samples = min(pair.run.test for group in groups.values() for pair in group)
    cells = {name: _columns(pair.both(_accuracy) for pair in group) for name, group in groups.items()}
    return metrics.accuracy_score(cells, floor=1 / samples)


def _kinds(corrupted: Sequence[_Pair]) -> list[str]:
    return list(corrupted[0].real["corruptions"]) if corrupted else []


def _robustness_score(corrupted: Sequence[_Pair]) -> float | None:
    if not corrupted:
        return None
    cells = {k: _columns(p.both(lambda v, k=k: _lost(v, k)) for p in corrupted) for k in _kinds(corrupted)}
    return metrics.robustness_score(cells, floor=1 / corrupted[0].run.test)


def _training_score(settings: Sequence[_Pair]) -> float | None:
    if len(settings) < 2:
        return None
    own, real = _columns(pair.both(_accuracy) for pair in settings)
    refused = any("refused" in pair.own for pair in settings)
    deviations = [math.inf if refused else stdev(own)], [stdev(real)]
    return metrics.training_score(
        _columns(pair.both(_seconds) for pair in settings), deviations, floor=1 / settings[0].run.test
    )


def _complexity_score(deployed: Iterable[Result]) -> float | None:
    found = list(deployed)
    if not found:
        return None
    return metrics.complexity_score([v.get("compression", 0) for v in found], [v.get("speedup", 0) for v in found])


def _inference_score(deployed: Iterable[Result], real: bool) -> float | None:
    found = [{"seconds": 1.0, "bytes": 1} if real else v for v in deployed]
    if not found:
        return None
    seconds, nbytes = (
        ([v.get(key, math.inf) for v in found], [v.get(f"real_{key}", 1) for v in found])
        for key in ("seconds", "bytes")
    )
    return metrics.inference_score(seconds, nbytes)


def _reasons(pairs: Iterable[_Pair], deployed: Mapping[str, Result]) -> list[str]:
    reasons = [f"{pair.run.architecture}: {pair.own['refused']}" for pair in pairs if "refused" in pair.own]
    for name, found in deployed.items():
        reasons += [f"{name}: {found[key]}" for key in ("refused", "undeployable") if key in found]
    return list(dict.fromkeys(reasons))
