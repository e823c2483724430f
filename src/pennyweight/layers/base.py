"""The contract of a layer transform: a function of what goes into a layer (quantised inputs) or comes out of it.

`prepare` makes it from a recipe by its registered name, tells it the layer, and hands it the data if it asks for some.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from .. import registry
from ..errors import PlanError


class SignInput(NamedTuple):
    """Inputs that are signs in eval mode: + where x >= threshold, times mean |x| of the sample if `sample_scale`.

    threshold: float32 [channels], or None for 0.
    """

    threshold: Tensor | None
    sample_scale: bool


class LayerTransform(nn.Module):
    """A function of a layer's input or output, registered under `acts_on="layers"`. Options are the constructor's.

    An attribute `bits`, where there is one, says what a code takes: cost tables read it.
    """

    needs_data: ClassVar[bool] = False  # whether it cannot work before `fit`
    made_from: dict[str, Any]  # the recipe's entry, from which a stored model makes it again

    def for_layer(self, layer: nn.Module) -> None:
        """Take what depends on the layer (channels). Raises `PlanError` for layers it cannot serve."""

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Set steps and bounds from tensors as `forward` will get them. Raises `DataError` if they will not do."""

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(codes, scale [samples, 1, ...] or None) with forward(x) = codes * scale.

        Of what goes into it, a layer multiplies the codes, and then by the scale.
        """
        return self(x), None

    def sign_input(self) -> SignInput | None:
        """What the inputs are if they are signs in eval mode, else None. Raises `WeightError` if they are not yet."""
        return None


class Replacement(nn.Module, ABC):
    """A module that takes the place of one of a certain form, registered under `acts_on="layers"`.

    replaced: names of that module's layers that are no more; its others are shared. form: what `fits` asks for.
    """

    replaced: ClassVar[tuple[str, ...]]
    form: ClassVar[str]
    made_from: dict[str, Any] | None = None  # the recipe's entry, from which a stored model makes it again

    @classmethod
    @abstractmethod
    def fits(cls, module: Any) -> bool:
        """Whether it can take the module's place."""

    @classmethod
    @abstractmethod
    def of(cls, entry: Mapping[str, Any], module: Any, weight_quantizer: Any = None) -> Self:
        """As an entry {method: name, option: value, ...} describes it, with a weight transform if it can use one.

        Raises `UnknownNameError` and `PlanError` on methods and options there are not, and modules that do not fit.
        """

    def quantizers(self) -> list[LayerTransform]:
        """Of its activations; each gets its input by a call."""
        return [module for module in self.children() if isinstance(module, LayerTransform)]


def make_layer_transform(entry: Mapping[str, Any], layer: nn.Module) -> LayerTransform:
    """The transform that an entry {method: name, option: value, ...} of a recipe describes, for that layer.

    Raises `UnknownNameError` on unknown names, `PlanError` on unknown options and layers that it cannot serve.
    """
    options = {key: value for key, value in entry.items() if key != "method"}
    target = registry.get(entry["method"], "layers").target
    if not (isinstance(target, type) and issubclass(target, LayerTransform)):
        raise PlanError(f"{entry['method']!r} is a module of its own, not a function of a layer's input or output")
    check_options(entry["method"], target, options)
    made = target(**options)
    made.for_layer(layer)
    made.made_from = dict(entry)
    return made


def as_entry(source: Any) -> dict[str, Any]:
    """A recipe's entry, which may be the name of a method alone. Raises `PlanError` for what is neither."""
    if isinstance(source, str):
        return {"method": source}
    if not isinstance(source, Mapping) or not isinstance(source.get("method"), str):
        raise PlanError(f"a method is its name or a mapping with 'method', not {source!r}")
    return {str(key): value for key, value in source.items()}


def check_options(method: str, target: Any, options: Mapping[str, Any]) -> None:
    """`PlanError` naming the options there are unless all of those given are among them."""
    known = list(inspect.signature(target).parameters)
    unknown = sorted(options.keys() - known)
    if unknown:
        raise PlanError(f"{method!r} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")


def channels_of(layer: nn.Module) -> tuple[int, int]:
    """(input channels, their axis from the end) of a Linear or a convolution. Raises `PlanError` for others."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, 1
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.in_channels, 1 + len(layer.kernel_size)
    raise PlanError(f"{type(layer).__name__} has no input channels that this method knows")


def per_channel(values: Tensor, axis: int) -> Tensor:
    """values [channels] in a shape that broadcasts against a tensor whose channels are on that axis from the end."""
    return values.view(-1, *[1] * (axis - 1))


def per_sample_mean_magnitude(x: Tensor) -> Tensor:
    """mean |x| of each sample (axis 0), without gradient: [samples, 1, ...]."""
    with torch.no_grad():
        return x.abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
