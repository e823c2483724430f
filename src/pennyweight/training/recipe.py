"""Recipes: which layers of a model are trained with which methods.

    rules:
      - match: "layers.*.conv1"                       # a glob over layer names, or a type ("Conv2d"), or a list of both
        weight: {method: binary, estimator: reste}    # a weight transform, or a list of them that chain in order
        input: {method: sign, estimator: reste}       # a layer transform of what comes in
        output: {method: spatial-scale}               # one of what comes out
      - match: "*.shortcut"
        exclude: true                                 # stays as it is, whatever other rules say
    preset: reste                                     # a published method's rules, after those above

A method without options may be written as its name alone. A layer takes part in every rule that matches it: their
weight transforms chain in the order of the rules; a second input or output is a contradiction.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from .. import strict_yaml
from ..errors import PlanError, UnknownNameError
from .presets import PRESETS


@dataclass(frozen=True)
class Rule:
    """One rule. match: patterns, any of which is enough. weight: the chain, input, output: entries with `method`."""

    match: tuple[str, ...]
    weight: tuple[Mapping[str, Any], ...] = ()
    input: Mapping[str, Any] | None = None
    output: Mapping[str, Any] | None = None
    exclude: bool = False

    @classmethod
    def of(cls, source: Any) -> Self:
        """From a rule as YAML has it. Raises `PlanError` on unknown keys, and on rules that do nothing."""
        if not isinstance(source, Mapping):
            raise PlanError(f"a rule is a mapping with 'match', not {source!r}")
        known = ("match", "weight", "input", "output", "exclude")
        unknown = sorted(set(source) - set(known))
        if unknown:
            raise PlanError(f"a rule has {', '.join(map(repr, unknown))}; its keys are: {', '.join(known)}")
        match = source.get("match")
        patterns = (match,) if isinstance(match, str) else tuple(match or ())
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise PlanError(f"a rule needs 'match', a pattern or a list of them, not {match!r}")
        weight = source.get("weight") or ()
        chain = tuple(map(_entry, weight)) if isinstance(weight, list | tuple) else (_entry(weight),)
        ends = [None if source.get(key) is None else _entry(source[key]) for key in ("input", "output")]
        rule = cls(patterns, chain, *ends, exclude=bool(source.get("exclude", False)))
        acts = bool(rule.weight or rule.input or rule.output)
        if acts == rule.exclude:
            raise PlanError(f"the rule for {', '.join(patterns)} must either name methods or say exclude: true")
        return rule

    def matches(self, name: str, module: nn.Module) -> bool:
        kind = type(module).__name__
        return any(pattern == kind or fnmatch.fnmatchcase(name, pattern) for pattern in self.match)

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"match": list(self.match)}
        if self.weight:
            found["weight"] = [dict(entry) for entry in self.weight]
        for key, entry in (("input", self.input), ("output", self.output)):
            if entry is not None:
                found[key] = dict(entry)
        return {**found, "exclude": True} if self.exclude else found


@dataclass(frozen=True)
class Recipe:
    """Rules in order."""

    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, source: Recipe | Mapping[str, Any] | str | os.PathLike[str]) -> Recipe:
        """A recipe from itself, a mapping, or the path of a YAML file.

        Raises `PlanError` if the file cannot be read or has keys other than `rules` and `preset`.
        """
        if isinstance(source, Recipe):
            return source
        if not isinstance(source, Mapping):
            path, source = source, strict_yaml.read(source)
            if not isinstance(source, Mapping):
                raise PlanError(f"{path} is no recipe: it must be a mapping with 'rules'")
        unknown = sorted(set(source) - {"rules", "preset"})
        if unknown:
            raise PlanError(f"a recipe has 'rules' and 'preset', but not {', '.join(map(repr, unknown))}")
        rules = source.get("rules") or []
        if not isinstance(rules, Sequence) or isinstance(rules, str):
            raise PlanError(f"the rules of a recipe are a list, not {rules!r}")
        own = tuple(map(Rule.of, rules))
        own += preset(source["preset"]).rules if source.get("preset") else ()
        if not own:
            raise PlanError("the recipe has no rules; give 'rules' or a 'preset'")
        return cls(own)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as `of` takes it; for YAML and JSON."""
        return {"rules": [rule.to_dict() for rule in self.rules]}

    def fingerprint(self) -> str:
        """Hexadecimal digest, the same for the same rules: tells whether a checkpoint comes from this recipe."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def preset(name: str) -> Recipe:
    """The rules of a published method (`presets.PRESETS`). Raises `UnknownNameError` with the close matches."""
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return Recipe.of({"rules": PRESETS[name]})


def _entry(source: Any) -> dict[str, Any]:
    if isinstance(source, str):
        return {"method": source}
    if not isinstance(source, Mapping) or not isinstance(source.get("method"), str):
        raise PlanError(f"a method is its name or a mapping with 'method', not {source!r}")
    return {str(key): value for key, value in source.items()}
