"""Models and optimizers by the names that a recipe gives them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .. import models, registry
from ..checkpoints import load_checkpoint
from ..errors import ArtifactError, PlanError, UnknownNameError
from ..factory import FACTORY, call_factory
from ..optim.wrapper import OptimizerWrapper
from .hooks import StepHook
from .settings import ModelSettings, OptimizerSettings

#: Optimizers of torch.optim that step without a closure on dense gradients.
_TORCH_OPTIMIZERS: dict[str, Any] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
}


def make_model(settings: ModelSettings) -> nn.Module:
    """The model, with its weights loaded where there are any.

    Raises UnknownNameError for names there are not, PlanError for options the factory does not take, ArtifactError if
    the factory fails or the weights do not fit.
    """
    if FACTORY.fullmatch(settings.name):
        model = call_factory(settings.name, settings.options)
        if not isinstance(model, nn.Module):
            raise ArtifactError(f"{settings.name} returned a {type(model).__name__}; it must return an nn.Module")
    else:
        known = _factories()
        if settings.name not in known:
            raise UnknownNameError("model", settings.name, known)
        try:
            inspect.signature(known[settings.name]).bind(**settings.options)
        except TypeError as error:
            raise PlanError(f"model {settings.name}: {error}") from None
        model = known[settings.name](**settings.options)
    if settings.weights is not None:
        try:
            model.load_state_dict(load_checkpoint(settings.weights))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(f"the weights {settings.weights} do not fit {settings.name}: {reason}") from None
    return model


def make_optimizer(settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over all parameters that want a gradient, in groups with and without weight decay, and what the
    settings put around it.

    Raises UnknownNameError for names there are not, PlanError for options that the optimizer refuses or if there is
    nothing to train.
    """
    kind: Any = _TORCH_OPTIMIZERS.get(settings.name)
    if kind is None:
        registered = {
            name: kind
            for name, kind in _registered().items()
            if issubclass(kind, torch.optim.Optimizer) and not issubclass(kind, OptimizerWrapper)
        }
        if settings.name not in registered:
            raise UnknownNameError("optimizer", settings.name, [*_TORCH_OPTIMIZERS, *registered])
        kind = registered[settings.name]
    parameters = list(model.parameters())  # frozen ones, too: they have no gradient, and a schedule may freeze more
    if not any(p.requires_grad for p in parameters):
        raise PlanError(f"{type(model).__name__} has no parameter to train")
    groups = [{"params": list(parameters), "weight_decay": settings.weight_decay}]
    if settings.decay == "matrices":
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    try:
        optimizer = kind([group for group in groups if group["params"]], lr=settings.lr, **settings.options)
    except (TypeError, ValueError) as error:
        raise PlanError(f"optimizer {settings.name} refuses its options: {error}") from None
    for entry in settings.around:
        optimizer = _wrapped(optimizer, entry, model)
    return optimizer


def _wrapped(optimizer: torch.optim.Optimizer, entry: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    options = dict(entry)
    name = options.pop("method", None)
    known = {name: kind for name, kind in _registered().items() if issubclass(kind, OptimizerWrapper)}
    if name not in known:
        raise UnknownNameError("method around an optimizer", str(name), known)
    try:
        return known[name].around(optimizer, model, **options)
    except TypeError as error:
        raise PlanError(f"{name}: {error}") from None


def make_hook(entry: Mapping[str, Any], model: nn.Module) -> StepHook:
    """The registered method of `optim` that acts around the step: {method: name, option: value, ...}.

    Raises UnknownNameError for names there are not, PlanError for options that it does not take.
    """
    options = dict(entry)
    name = options.pop("method", None)
    known = {name: kind for name, kind in _registered().items() if hasattr(kind, "before_step")}
    if name not in known:
        raise UnknownNameError("method around the step", str(name), known)
    try:
        inspect.signature(known[name]).bind(model, **options)
    except TypeError as error:
        raise PlanError(f"{name}: {error}") from None
    return known[name](model, **options)


def _registered() -> dict[str, type]:
    return {entry.name: entry.target for entry in registry.methods("optim") if inspect.isclass(entry.target)}


def _factories() -> dict[str, Callable[..., nn.Module]]:
    """The functions of `pennyweight.models` that make a reference architecture: those that return a class of their own
    module."""
    found: dict[str, Callable[..., nn.Module]] = {}
    for info in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        module = importlib.import_module(info.name)
        for name, function in _public_functions(module):
            made = typing.get_type_hints(function).get("return")
            if inspect.isclass(made) and issubclass(made, nn.Module) and made.__module__ == info.name:
                found[name] = function
    return found


def _public_functions(module: Any) -> Iterable[tuple[str, Callable[..., Any]]]:
    return (
        (name, function)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    )
