"""Recipes: which layers of a model are trained with which methods.

    rules:
      - match: "layers.*.conv1"                       # a glob over layer names, or a type ("Conv2d"), or a list of both
        weight: {method: binary, estimator: reste}    # a weight transform, or a list of them that chain in order
        input: {method: sign, estimator: reste}       # a layer transform of what comes in
        output: {method: spatial-scale}               # one of what comes out
        hook: {method: cga, start: 0.9}               # what acts on the layer's weight around the optimizer's step
      - match: "*.shortcut"
        exclude: true                                 # stays as it is, whatever other rules say
      - match: SelfAttention
        attention: {method: query-key, input_quantizer: lsq}    # what takes the place of an attention of its form
    preset: reste                                     # a published method's rules, after those above

`attention` acts on the matched modules that have the form its method asks for, the other keys on the matched layers;
a rule must find one or the other. A method without options may be written as its name alone. A layer takes part in
every rule that matches it: their weight transforms chain in the order of the rules; a second input, output or hook is
a contradiction.
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
from ..layers.base import as_entry
from .presets import MODEL_PRESETS, PRESETS

_ENTRIES = ("input", "output", "hook", "attention")


@dataclass(frozen=True)
class Rule:
    """One rule. match: patterns, any of which is enough. weight: the chain; the others: entries with `method`."""

    match: tuple[str, ...]
    weight: tuple[Mapping[str, Any], ...] = ()
    input: Mapping[str, Any] | None = None
    output: Mapping[str, Any] | None = None
    hook: Mapping[str, Any] | None = None
    attention: Mapping[str, Any] | None = None
    exclude: bool = False

    @classmethod
    def of(cls, source: Any) -> Self:
        """From a rule as YAML has it. Raises `PlanError` on unknown keys, and on rules that do nothing."""
        if not isinstance(source, Mapping):
            raise PlanError(f"a rule is a mapping with 'match', not {source!r}")
        known = ("match", "weight", *_ENTRIES, "exclude")
        unknown = sorted(set(source) - set(known))
        if unknown:
            raise PlanError(f"a rule has {', '.join(map(repr, unknown))}; its keys are: {', '.join(known)}")
        match = source.get("match")
        patterns = (match,) if isinstance(match, str) else tuple(match or ())
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise PlanError(f"a rule needs 'match', a pattern or a list of them, not {match!r}")
        weight = source.get("weight") or ()
        chain = tuple(map(as_entry, weight)) if isinstance(weight, list | tuple) else (as_entry(weight),)
        entries = {key: as_entry(source[key]) for key in _ENTRIES if source.get(key) is not None}
        rule = cls(patterns, chain, **entries, exclude=bool(source.get("exclude", False)))
        if bool(rule.weight or entries) == rule.exclude:
            raise PlanError(f"the rule for {', '.join(patterns)} must either name methods or say exclude: true")
        return rule

    def matches(self, name: str, module: nn.Module) -> bool:
        kind = type(module).__name__
        return any(pattern == kind or fnmatch.fnmatchcase(name, pattern) for pattern in self.match)

    @property
    def on_layers(self) -> bool:
        """Whether it has methods for layers. The hook of a rule for attentions alone is one for what replaces them."""
        return bool(self.weight or self.input or self.output or (self.hook and not self.attention))

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"match": list(self.match)}
        if self.weight:
            found["weight"] = [dict(entry) for entry in self.weight]
        found |= {key: dict(entry) for key in _ENTRIES if (entry := getattr(self, key)) is not None}
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
    """The rules of a published method, for any model (`presets.PRESETS`) or for one of models/ (`MODEL_PRESETS`).

    Raises `UnknownNameError` with the close matches.
    """
    known = PRESETS | MODEL_PRESETS
    if name not in known:
        raise UnknownNameError("preset", name, known)
    return Recipe.of({"rules": known[name]})
