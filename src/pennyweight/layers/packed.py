"""Packed layers: modules whose weights are kept as blobs and decoded when needed.

`install` turns a module into its packed twin in place: its class becomes a subclass `Packed<Class>` of what it was, so
`isinstance`, attributes, hooks and the module's own forward stay. Each packed parameter is replaced by

    a buffer of the parameter's own name   uint8 [nbytes], the blob; the state dict therefore equals the stored file
    a property of the same name            the decoded weight, so code that reads `module.weight` keeps working

which serves every kind of layer, those included whose weight is read by somebody else's forward (attention, tied
heads). Some layers know better than to decode first: an embedding looks up rows (packed_embedding.py), and what must
save memory multiplies codes (packed_linear.py, packed_attention.py, packed_convolution.py, packed_recurrent.py).

memory "fast" keeps the decoded weight after its first use, in the dtype and on the device of the module. "low" never
holds more than a layer's: Linear, attention, convolutions and recurrent layers multiply what is packed
(kernels/integer.py, with inputs quantised row by row to `activation_bits`, 16 or 8) where that serves; other layers,
and with 32 bits all of them, decode and drop the weight. Blobs stay on the CPU, where they are decoded, wherever the
module goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import UnknownNameError, WeightError
from ..formats import PackedWeight, from_bytes
from ..kernels.integer import ActivationBits
from . import packed_attention, packed_convolution, packed_embedding, packed_linear  # noqa: F401  (their twins enter themselves)
from .packed_module import Memory, PackedModule, blob_bytes, packed_class
from .packed_recurrent import PackedRecurrent
from .sites import MatrixView, weight_sites


def install(
    model: nn.Module,
    packed: Mapping[str, PackedWeight],
    memory: Memory = "fast",
    activation_bits: ActivationBits = 16,
) -> nn.Module:
    """Replace weights by packed ones, in place, and return the model.

    packed: name of a weight site, or of an already packed weight -> packed weight of its matrix shape. Tied weights
    follow under any of their names. Names given with one and the same object share one blob.
    Raises UnknownNameError for a name that is no weight, WeightError for a shape that does not fit; the model is then
    as it was.
    """
    blobs = {id(weight): weight.to_bytes() for weight in packed.values()}
    both = {name: (weight, blobs[id(weight)]) for name, weight in packed.items()}
    return install_blobs(model, both, memory, activation_bits)


def install_blobs(
    model: nn.Module,
    packed: Mapping[str, tuple[PackedWeight, bytes]],
    memory: Memory = "fast",
    activation_bits: ActivationBits = 16,
) -> nn.Module:
    """`install` for packed weights whose bytes are at hand."""
    check_memory(memory, activation_bits)
    places = {name: place for place in _places(model) for name in place.names}
    for name, (weight, _) in packed.items():
        if name not in places:
            raise UnknownNameError("weight", name, places)
        wanted = places[name].view.matrix_shape
        if tuple(weight.shape) != wanted:
            raise WeightError(f"{name}: the packed weight is {list(weight.shape)}, the layer needs {list(wanted)}")
    blobs: dict[int, Tensor] = {}
    for name, (weight, data) in packed.items():
        if id(weight) not in blobs:
            blobs[id(weight)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        place = places[name]
        for module, attribute in place.holders:
            twin = _make_packed(module, attribute, place.view)
            twin._packed_memory, twin._packed_activation_bits = memory, activation_bits
            twin._set_packed(attribute, weight, blobs[id(weight)], place.view, place.like)
    return model


def set_memory(model: nn.Module, memory: Memory, activation_bits: ActivationBits = 16) -> None:
    """Change what packed layers keep in memory; see the module docstring.

    Raises ValueError for a memory other than "fast" and "low" and activation bits other than 8, 16 and 32.
    """
    check_memory(memory, activation_bits)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module._packed_memory = memory
            module._packed_activation_bits = activation_bits
            module._forget_decoded()
            module._packed_parsed.clear()


def check_memory(memory: Memory, activation_bits: ActivationBits) -> None:
    """Raise ValueError unless these are ways in which packed layers can run."""
    if memory not in ("fast", "low"):
        raise ValueError(f"memory must be 'fast' or 'low', not {memory!r}")
    if activation_bits not in (8, 16, 32):
        raise ValueError(f"activation_bits must be 8, 16 or 32, not {activation_bits!r}")


def arrange(model: nn.Module) -> nn.Module:
    """Have the packed layers that multiply make ready now, rather than when they first run; returns the model."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.arrange()
    return model


def free_decoded(model: nn.Module) -> None:
    """Have packed layers hold no more than their blobs, until they run again."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module._forget_decoded()
            module._packed_parsed.clear()


def packed_blobs(model: nn.Module) -> dict[tuple[str, ...], bytes]:
    """The blobs of a packed model, in the order of its modules: all names of the weight (first its own) -> bytes."""
    return {
        tuple(place.names): blob_bytes(cast(PackedModule, module)._blob(attribute))
        for place in _places(model)
        for module, attribute in place.holders[:1]
        if place.packed
    }


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model by name, tied ones once."""
    return {names[0]: from_bytes(blob) for names, blob in packed_blobs(model).items()}


@dataclass
class _Place:
    """A weight, packed or not: all its names, the layers that hold it, and a tensor of the dtype and device it has."""

    names: list[str]
    holders: list[tuple[nn.Module, str]]
    view: MatrixView
    like: Tensor
    packed: bool


def _places(model: nn.Module) -> list[_Place]:
    """Weight sites and packed weights, tied ones once, in the order of the modules."""
    by_tensor: dict[int, _Place] = {}
    sites = {name: site for site in weight_sites(model) for name in (site.name, *site.aliases)}
    for module_name, module in model.named_modules(remove_duplicate=False):
        views = module._packed_views if isinstance(module, PackedModule) else {}
        for attribute in [*module._parameters, *views]:
            name = f"{module_name}.{attribute}" if module_name else attribute
            if attribute in views:
                packed = cast(PackedModule, module)
                tensor, view, like = packed._blob(attribute), views[attribute], packed._decoded(attribute)
            elif name in sites:
                tensor, view, like = sites[name].parameter, sites[name].view, sites[name].parameter
            else:
                continue
            place = by_tensor.setdefault(id(tensor), _Place([], [], view, like, attribute in views))
            place.names.append(name)
            place.holders.append((module, attribute))
    return list(by_tensor.values())


def _make_packed(module: nn.Module, attribute: str, view: MatrixView) -> PackedModule:
    """Change the class of a module to the packed twin that has this attribute packed, too."""
    if isinstance(module, PackedModule):
        original, views, parsed = module._packed_original, module._packed_views, module._packed_parsed
    else:
        original, views, parsed = type(module), {}, {}
    vars(module).update(_packed_views=views, _packed_parsed=parsed)
    module.__class__ = packed_class(original, tuple(sorted({*views, attribute})), view.order == "rows first")
    twin = cast(PackedModule, module)
    if isinstance(twin, PackedRecurrent):
        twin._init_flat_weights()
    return twin
