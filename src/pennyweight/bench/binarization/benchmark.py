"""`pennyweight bench binarization`: all runs, score cards, results.json and index.html.

found = benchmark(Path("out"), QUICK, ["bnn", "reste"], TASKS)
found.cards[1].scores["task"], found.page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, PlanError
from ...timing_cache import machine
from ...training.presets import PRESETS
from ...training.recipe import Recipe, preset
from ..results import versions
from .data import TASKS
from .grid import Profile, Progress, carry_out, make_runs
from .page import page
from .runs import REAL
from .scores import Card, make_card

RESULTS, PAGE = "results.json", "index.html"


@dataclass(frozen=True)
class Benchmark:
    """cards: the real twin's first, then the methods'. facts: what was run, and where. complete: no run is missing."""

    directory: Path
    cards: list[Card]
    facts: dict[str, Any]
    complete: bool

    @property
    def page(self) -> Path:
        return self.directory / PAGE

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in results.json."""
        return {**self.facts, "complete": self.complete, "methods": [card.to_dict() for card in self.cards]}


def benchmark(
    directory: Path,
    profile: Profile,
    methods: Sequence[str] = (),
    tasks: Sequence[str] = TASKS,
    workers: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Benchmark:
    """Run what is missing in the directory, and write the results there.

    methods: presets of `training.presets`, or paths of recipes (YAML, `rules` as pennyweight.prepare takes them),
    called by the file's name; none: all presets. workers: see `grid.carry_out`.
    Raises UnknownNameError for methods there are not, PlanError for two of the same name, and what `carry_out` does.
    """
    rules = {REAL: None} | dict(_rules(name) for name in methods or PRESETS)
    if len(rules) != 1 + len(methods or PRESETS):
        raise PlanError(f"two methods have the same name, or that of the twin, {REAL!r}: {', '.join(methods)}")
    runs = make_runs(profile, list(rules), tasks)
    results = carry_out(runs, rules, directory, workers, progress)
    facts = {
        "profile": profile.name,
        "settings": json.loads(json.dumps(asdict(profile))),
        "tasks": list(tasks),
        "runs": len(results),
        "machine": machine(),
        "versions": versions(),
    }
    found = Benchmark(directory, [make_card(name, results) for name in rules], facts, len(results) == len(runs))
    _write(directory / RESULTS, json.dumps(found.to_dict(), indent=1, ensure_ascii=False, allow_nan=False))
    _write(found.page, page(found.cards, facts))
    return found


def _rules(method: str) -> tuple[str, dict[str, Any]]:
    """(name, `prepare` section) of a preset or of a recipe's file."""
    if method.endswith((".yaml", ".yml")):
        return Path(method).stem, Recipe.of(Path(method)).to_dict()
    return method, preset(method).to_dict()


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
