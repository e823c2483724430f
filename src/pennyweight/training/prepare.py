"""`prepare`: have layers of a model learn under a recipe's methods. `calibrate`: fit the methods that need data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import registry
from ..compress.data import calls
from ..compress.observe import evaluating
from ..errors import DataError, PlanError, WeightError
from ..layers.base import LayerTransform, Replacement, as_entry, check_options, make_layer_transform
from ..layers.quantised import QuantisedLayer, can_quantise, quantise
from ..layers.sites import weight_sites
from ..weights.base import WeightTransform
from .building import make_hook
from .recipe import Recipe, Rule


@dataclass
class _Wanted:
    """What the rules want of one layer."""

    weight: list[Mapping[str, Any]] = field(default_factory=list)
    input: Mapping[str, Any] | None = None
    output: Mapping[str, Any] | None = None
    hook: Mapping[str, Any] | None = None


@dataclass
class _Made:
    """The same, made."""

    layer: nn.Module
    weight: list[WeightTransform]
    input: LayerTransform | None
    output: LayerTransform | None
    hook: Mapping[str, Any] | None  # to be made when the layer has its weight transforms


def prepare(
    model: nn.Module, recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str], data: Iterable[Any] | None = None
) -> nn.Module:
    """Register a recipe's weight transforms and input quantisers, in place, and return the model.

    recipe: a `Recipe`, a mapping, or the path of a YAML file (training/recipe.py has the rules). data: batches as the
    model takes them, for methods that are fitted to what comes in; see `calibrate`.
    Rules act on Linear and Conv1d/2d/3d. The first and the last layer with a weight, in the order of the model's
    modules, stay real unless a rule gives their exact names. Latent weights are found under
    `<layer>.parametrizations.weight.original` from now on; build the optimizer after this. Methods around the step
    wait in the layers as `step_hook`: `training.hooks.attach(optimizer, hooks_of(model))` wakes them, as `pennyweight
    train` does.

    Raises `PlanError` (or `UnknownNameError`) for a model that is prepared already, rules that match nothing, unknown
    methods and options, layers that a method cannot take, and rules that contradict each other; `WeightError` for
    weights that a method cannot represent (not finite, all equal). The model is then as it was. Raises `DataError` if a
    method needs data and there is none, or the data will not do.
    """
    recipe = Recipe.of(recipe)
    if any(isinstance(module, QuantisedLayer) for module in model.modules()):
        raise PlanError("the model is prepared already; prepare a fresh one, with all rules in one recipe")
    attentions = _attentions(model, recipe)
    gone = {f"{name}.{layer}" for name, (target, _) in attentions.items() for layer in target.replaced}
    wanted = _assign(model, recipe, gone)
    made = {name: _make(name, model.get_submodule(name), want) for name, want in wanted.items()}
    replacing = {name: _make_attention(name, model.get_submodule(name), *how) for name, how in attentions.items()}
    hungry = [name for name, parts in made.items() if parts.input is not None and parts.input.needs_data]
    hungry += [name for name, twin in replacing.items() if any(q.needs_data for q in twin.quantizers())]
    if hungry and data is None:
        raise DataError(f"the input quantiser of {hungry[0]} is fitted to data; call prepare(model, recipe, data=...)")
    for parts in made.values():
        layer = quantise(parts.layer)
        for transform in parts.weight:
            parametrize.register_parametrization(layer, "weight", transform)
        layer.input_quantizer, layer.output_transform = parts.input, parts.output
        if parts.hook is not None:
            layer.step_hook = cast(nn.Module, make_hook(parts.hook, layer))
        layer.train(layer.training)  # the new parts, too
    for name, twin in replacing.items():
        model.set_submodule(name, twin.train(model.get_submodule(name).training))
    if data is not None:
        calibrate(model, data)
    return model


@torch.no_grad()
def calibrate(model: nn.Module, data: Iterable[Any]) -> None:
    """Fit input quantisers to the inputs they get in eval mode, all in one pass over the data.

    data: batches as the model takes them (no labels). Every quantiser is fitted to inputs that the layers before it
    made with theirs not yet fitted, those inside of replaced attentions passing what they get. Raises `DataError` if
    the data is empty or holds NaN or infinity.
    """
    seen: dict[LayerTransform, list[Tensor]] = {}

    def on_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        quantizer = cast(QuantisedLayer, module).input_quantizer
        if quantizer is not None:
            seen.setdefault(quantizer, []).append(inputs[0].detach())

    def on_call(quantizer: nn.Module, inputs: tuple[Any, ...], _: Tensor) -> Tensor:
        seen.setdefault(cast(LayerTransform, quantizer), []).append(inputs[0].detach())
        return inputs[0]  # a step that does not fit yet could round all attention to zero

    hooks = []
    for module in model.modules():
        if isinstance(module, QuantisedLayer):
            hooks.append(module.register_forward_pre_hook(on_input))
        elif isinstance(module, Replacement):
            hooks += [quantizer.register_forward_hook(on_call) for quantizer in module.quantizers()]
    try:
        with evaluating(model):
            for batch in calls(model, data):
                batch(model)
    finally:
        for hook in hooks:
            hook.remove()
    for quantizer, batches in seen.items():
        if not all(bool(torch.isfinite(batch).all()) for batch in batches):
            raise DataError("the calibration data makes NaN or infinite inputs of a layer; remove those samples")
        quantizer.fit(batches)


def _layers_and_ends(model: nn.Module) -> tuple[dict[str, nn.Module], set[str]]:
    """Layers with weights by name, and the names of the first and the last of them."""
    layers = {site.module_name: site.module for site in weight_sites(model)}
    if not layers:
        raise PlanError(f"this {type(model).__name__} has no layers with weights")
    return layers, {next(iter(layers)), next(reversed(layers))}


def _attentions(model: nn.Module, recipe: Recipe) -> dict[str, tuple[type[Replacement], Rule]]:
    """Attention name -> what replaces it, and the rule that says so.

    Raises `PlanError` for rules whose attention method finds no attention of its form, nor a layer for their other
    keys; of two rules for one attention; and if the attention is the model itself.
    """
    found: dict[str, tuple[type[Replacement], Rule]] = {}
    _, ends = _layers_and_ends(model)
    for rule in recipe.rules:
        if rule.attention is None:
            continue
        method = rule.attention["method"]
        target = registry.get(method, "layers").target
        if not (isinstance(target, type) and issubclass(target, Replacement)):
            raise PlanError(f"{method!r} is no method that takes the place of an attention; query-key is")
        names = [
            name
            for name, module in model.named_modules()
            if rule.matches(name, module)
            and target.fits(module)
            and (name in rule.match or not ends & {f"{name}.{layer}" for layer in target.replaced})
        ]
        if not names and not rule.on_layers:
            raise PlanError(
                f"the rule for {', '.join(rule.match)} matches no attention that {method!r} can replace; it needs "
                f"{target.form}"
            )
        for name in names:
            if name == "":
                raise PlanError(f"{method!r} cannot replace the model itself; put the attention into another module")
            if name in found:
                raise PlanError(f"{name}: two rules replace this attention; let one of them exclude or not match it")
            if not any(other.exclude and other.matches(name, model.get_submodule(name)) for other in recipe.rules):
                found[name] = target, rule
    return found


def _make_attention(name: str, attention: nn.Module, target: type[Replacement], rule: Rule) -> Replacement:
    """What takes an attention's place; the model is not changed yet. Errors name the attention."""
    entry = dict(rule.attention or {})
    quantizer = entry.pop("weight_quantizer", None)
    try:
        transform = None if quantizer is None else make_weight_transform(as_entry(quantizer))
        twin = target.of(entry, attention, transform)
        for layer in twin.modules():
            if rule.hook is not None and isinstance(layer, QuantisedLayer):
                layer.step_hook = cast(nn.Module, make_hook(rule.hook, layer))
    except (PlanError, WeightError) as error:
        raise type(error)(f"{name}: {error}") from error
    return twin


def _assign(model: nn.Module, recipe: Recipe, gone: set[str]) -> dict[str, _Wanted]:
    """Layer name -> what the rules want of it, in the order of the modules. gone: layers that others take the place of,
    which rules may match, but which are not prepared."""
    layers, ends = _layers_and_ends(model)
    layered = [rule for rule in recipe.rules if rule.on_layers or rule.exclude]
    matched = {id(rule): _matched(rule, layers) for rule in layered}
    excluded = gone | {name for rule in layered if rule.exclude for name in matched[id(rule)]}
    wanted: dict[str, _Wanted] = {}
    for rule in layered:
        if rule.exclude:
            continue
        names = [name for name in matched[id(rule)] if name not in ends or name in rule.match]
        if not names:
            raise PlanError(
                f"the rule for {', '.join(rule.match)} matches only {', '.join(matched[id(rule)])}, and the first and "
                "last layer stay real unless a rule gives their exact names"
            )
        for name in names:
            if name not in excluded:
                _add(wanted.setdefault(name, _Wanted()), rule, name)
    if not wanted and not gone:
        raise PlanError("every layer that the rules match is excluded")
    return {name: wanted[name] for name in layers if name in wanted}


def _matched(rule: Rule, layers: Mapping[str, nn.Module]) -> list[str]:
    names = [name for name, module in layers.items() if rule.matches(name, module)]
    if not names:
        there = ", ".join(f"{name} ({type(module).__name__})" for name, module in layers.items())
        raise PlanError(f"the rule for {', '.join(rule.match)} matches no layer; there are: {there}")
    return names


def _add(wanted: _Wanted, rule: Rule, name: str) -> None:
    wanted.weight.extend(rule.weight)
    for role in ("input", "output", "hook"):
        entry = getattr(rule, role)
        if entry is None:
            continue
        if getattr(wanted, role) is not None:
            raise PlanError(f"{name}: two rules give it a method for its {role}; let one rule exclude or not match it")
        setattr(wanted, role, entry)


def _make(name: str, layer: nn.Module, wanted: _Wanted) -> _Made:
    """The transforms of one layer, fitted to its weight; nothing is changed yet. Errors name the layer."""
    try:
        if not can_quantise(layer):
            raise PlanError(
                f"a {type(layer).__name__} is a kind of layer that no method here can take; match Linear, Conv1d, "
                "Conv2d or Conv3d, or exclude it"
            )
        chain: list[WeightTransform] = []
        weight = cast(Tensor, layer.weight).detach()
        for entry in wanted.weight:
            if chain and chain[-1].discrete:
                raise PlanError(
                    f"{entry['method']!r} cannot follow {wanted.weight[len(chain) - 1]['method']!r}, which yields "
                    "discrete weights: two weight rules that do not chain; put it first, or exclude the layer from one"
                )
            transform = make_weight_transform(entry).to(weight.device)
            transform.fit(weight)
            with torch.no_grad():
                if not chain and hasattr(transform, "right_inverse"):
                    weight = cast(Any, transform).right_inverse(weight)
                weight = transform(weight)
            chain.append(transform)
        ends = [None if e is None else make_layer_transform(e, layer) for e in (wanted.input, wanted.output)]
        if wanted.hook is not None:
            _try_hook(wanted.hook, cast(Tensor, layer.weight).detach(), chain)
    except (PlanError, WeightError) as error:
        raise type(error)(f"{name}: {error}") from error
    first, last = (end if end is None else end.to(weight.device) for end in ends)
    return _Made(layer, chain, first, last, wanted.hook)


def _try_hook(entry: Mapping[str, Any], weight: Tensor, chain: Iterable[WeightTransform]) -> None:
    """Raise what making the hook will raise, on a stand-in for the layer."""
    layer = nn.Module()
    layer.weight = nn.Parameter(weight)
    for transform in chain:
        parametrize.register_parametrization(layer, "weight", transform)
    make_hook(entry, layer)


def make_weight_transform(entry: Mapping[str, Any]) -> WeightTransform:
    """The transform of an entry {method: name, option: value, ...}; `UnknownNameError` or `PlanError` on others."""
    options = {key: value for key, value in entry.items() if key != "method"}
    target = registry.get(entry["method"], "weights").target
    check_options(entry["method"], target, options)
    return target(**options)
