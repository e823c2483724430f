"""`fold`: bake what is a plain network in disguise into its weights.

weight transforms      those that are not discrete (compander, L1 norm, standardisation, ...): the layer keeps their
                       value, bit for bit. Low-bit transforms behind them stay, with that value as their latent
                       weight: `convert` packs them
modules                that have a method `folded()` are replaced by what it returns: branch scales and norms of
                       inference that go into the layer before them
"""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..compress.observe import evaluating
from ..errors import PlanError, WeightError
from ..layers.quantised import QuantisedLayer, dequantise, remove_weight_chain, weight_chain
from ..weights.base import WeightTransform


@runtime_checkable
class Foldable(Protocol):
    """A module that training needs, but inference does not."""

    def folded(self) -> nn.Module:
        """What computes the same in eval mode: itself where it cannot be folded. It may change layers it refers to."""
        ...


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Fold what can be folded, in place, in eval mode, and return the model (or what replaces it as a whole).

    The result costs what the network without these methods costs, and has its names: it is saved as it is, and loads
    into a model built without them. Build optimizers anew. Raises `PlanError` if there is nothing to fold,
    `WeightError` if a weight is not finite. The model is then as it was.
    """
    chains = {name: m for name, m in model.named_modules() if _leading(m)}
    modules = [name for name, m in model.named_modules() if isinstance(m, Foldable)]
    if not chains and not modules:
        raise PlanError("there is nothing to fold: no weight transform but discrete ones, which convert() packs")
    with evaluating(model):
        values = {name: _value(name, layer) for name, layer in chains.items()}
    model.eval()
    for name, layer in chains.items():
        _bake(layer, values[name])
    for name in reversed(modules):  # inner modules first
        made = cast(Foldable, model.get_submodule(name)).folded()
        if not name:
            return made.eval()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made.eval())
    return model


def plain(model: nn.Module) -> nn.Module:
    """`fold`, or the model as it is in eval mode if no weight is under transforms."""
    return fold(model) if any(weight_chain(module) is not None for module in model.modules()) else model.eval()


def _leading(layer: nn.Module) -> list[WeightTransform]:
    """The transforms of its weight before the first discrete one."""
    found: list[WeightTransform] = []
    for transform in weight_chain(layer) or ():
        if not isinstance(transform, WeightTransform) or type(transform).discrete:
            break
        found.append(transform)
    return found


def _value(name: str, layer: nn.Module) -> torch.Tensor:
    weight = cast(Any, weight_chain(layer)).original
    for transform in _leading(layer):
        weight = transform(weight)
    if not bool(torch.isfinite(weight).all()):
        raise WeightError(f"{name}: the weight holds NaN or infinity; training has diverged, go back to a checkpoint")
    return weight.detach().clone()


def _bake(layer: nn.Module, value: torch.Tensor) -> None:
    chain = list(cast(Any, weight_chain(layer)))
    kept = chain[len(_leading(layer)) :]
    wants_gradient = cast(Any, weight_chain(layer)).original.requires_grad
    remove_weight_chain(layer)
    layer.weight = nn.Parameter(value, requires_grad=wants_gradient)  # new: optimizers may hold the latent one
    for transform in kept:
        parametrize.register_parametrization(layer, "weight", transform)
    if not kept and isinstance(layer, QuantisedLayer) and layer.input_quantizer is layer.output_transform is None:
        dequantise(layer)
