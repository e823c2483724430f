"""Layers with quantised inputs and weights: one forward for training and for running what was trained.

    y = product(codes of x, codes of w) * scale of x * scale of w          then the output transform, then + bias

Scales come after the product, so that a product of signs is a sum of +1 and -1, which float32 holds exactly in any
order: training and the packed kernels compute the same bits. (The bias is outside of the scale, as BiPer's paper has
it; its code multiplies it, too.)

`quantise` turns a Linear or a convolution into its quantised twin in place, by its class, as packed layers do: names,
hooks and `isinstance` stay. Codes of the weight come

    in training    from the weight transforms in `parametrizations.weight` (the last one's `factors`)
    converted      from the packed weight (layers/packed.py) and the buffer `scale`; of signs times signs
                   kernels/binary.py makes the product, straight from bits

A converted layer of signs takes its input as real numbers or as the packed signs that a layer before it has made: one
whose batch norm became `Thresholds` yields nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import registry
from ..errors import ArtifactError, DataError, PlanError
from ..kernels import binary
from .base import LayerTransform, Replacement, SignInput, make_layer_transform, per_channel, per_sample_mean_magnitude
from .packed import PackedModule


class QuantisedLayer(nn.Module, ABC):
    """What quantised twins share. Made by `quantise`, never by its constructor.

    input_quantizer, output_transform: a `LayerTransform` or None. step_hook: what acts on the weight around the
    optimizer's step in training, or None. Once converted: scale: float [outputs] or None;
    takes_signs: whether inputs are signs, of x >= input_threshold ([channels] or None for 0) and times mean |x| of the
    sample if sample_scale; output_threshold, output_flip: [outputs], or None if outputs are real.
    """

    input_quantizer: LayerTransform | None
    output_transform: LayerTransform | None
    step_hook: nn.Module | None
    weight: Any
    bias: Tensor | None
    scale: Tensor | None
    input_threshold: Tensor | None
    output_threshold: Tensor | None
    output_flip: Tensor | None
    takes_signs: bool
    sample_scale: bool
    _channel_axis: int  # of inputs and outputs, from the end
    _words: Tensor | None  # the weight's packed signs, made when first used

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer without its bias."""

    @abstractmethod
    def product_of_signs(self, x: Tensor, epilogue: binary.Epilogue) -> Tensor:
        """The same for an input of real numbers or packed signs, by the kernels, as they return it but for its axes."""

    def weight_factors(self) -> tuple[Tensor, Tensor | None]:
        """(codes, scale [outputs] or None) of the weight."""
        chain = weight_chain(self)
        if chain is None:
            return self.weight, self.scale
        last, weight = last_transform(chain)
        return last.factors(weight)

    def forward(self, input: Tensor) -> Tensor:
        if self.takes_signs:
            return self._forward_signs(input)
        sample_scale = None
        if self.input_quantizer is not None:
            input, sample_scale = self.input_quantizer.factors(input)
        codes, scale = self.weight_factors()
        return self._finish(self.product(input, codes.to(input.dtype)), sample_scale, scale)

    def _forward_signs(self, input: Tensor) -> Tensor:
        if self.output_threshold is not None and self.output_flip is not None:
            return self.product_of_signs(input, binary.Thresholds(self.output_threshold, self.output_flip))
        if self.output_transform is None and not self.sample_scale:
            scale, bias = (None if value is None else value.float() for value in (self.scale, self.bias))
            y = self.product_of_signs(input, binary.Scaled(scale, bias))
            return y.to(input.dtype) if input.is_floating_point() else y
        sample_scale = per_sample_mean_magnitude(input) if self.sample_scale else None
        return self._finish(self.product_of_signs(input, None).to(input.dtype), sample_scale, self.scale)

    def _finish(self, y: Tensor, sample_scale: Tensor | None, scale: Tensor | None) -> Tensor:
        if sample_scale is not None:
            y = y * sample_scale
        if scale is not None:
            y = y * per_channel(scale, self._channel_axis).to(y.dtype)
        if self.output_transform is not None:
            y = self.output_transform(y)
        return y if self.bias is None else y + per_channel(self.bias, self._channel_axis).to(y.dtype)

    def packed_signs(self, device: torch.device) -> Tensor:
        """The weight's signs as the kernels take them."""
        if self._words is None or self._words.device != device:
            packed = cast(PackedModule, self)
            with torch.inference_mode(False), torch.no_grad():
                view = packed._packed_views["weight"]
                signs = view.from_matrix(packed.packed_weight("weight").decode())
                self._words = self._pack(signs).to(device)
            packed._packed_parsed.clear()
        return self._words

    def _pack(self, signs: Tensor) -> Tensor:
        return binary.pack_signs(signs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._words = None
        super()._load_from_state_dict(*args, **kwargs)


class QuantisedLinear(QuantisedLayer, nn.Linear):
    """nn.Linear: [..., in] -> [..., out]."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def product_of_signs(self, x: Tensor, epilogue: binary.Epilogue) -> Tensor:
        if isinstance(epilogue, binary.Thresholds) and x.ndim != 2:
            raise DataError(f"this converted layer takes [samples, {self.in_features}], not {list(x.shape)}")
        if x.dtype != torch.int64:
            x = binary.pack_signs(x, self.input_threshold)
        y = binary.binary_linear(x.reshape(-1, x.shape[-1]), self.packed_signs(x.device), self.in_features, epilogue)
        return y.view(*x.shape[:-1], -1)


class _QuantisedConvolution(QuantisedLayer):
    in_channels: int
    groups: int
    padding_mode: str
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return cast(Any, self)._conv_forward(x, weight, None)


class QuantisedConv2d(_QuantisedConvolution, nn.Conv2d):
    """nn.Conv2d: [samples, in, height, width] -> [samples, out, height, width]."""

    def product_of_signs(self, x: Tensor, epilogue: binary.Epilogue) -> Tensor:
        x, padding = _pack_input(self, x, self.input_threshold)
        y = binary.binary_conv2d(
            x,
            self.packed_signs(x.device),
            self.in_channels // self.groups,
            self.stride,
            padding,
            self.dilation,
            0,
            epilogue,
        )
        return y if isinstance(epilogue, binary.Thresholds) else y.permute(0, 3, 1, 2).contiguous()

    def _pack(self, signs: Tensor) -> Tensor:
        return binary.pack_filters(signs)


class QuantisedConv1d(_QuantisedConvolution, nn.Conv1d):
    """nn.Conv1d: [samples, in, length] -> [samples, out, length]; for the kernels an image of height 1."""

    def product_of_signs(self, x: Tensor, epilogue: binary.Epilogue) -> Tensor:
        x, (padding,) = _pack_input(self, x, self.input_threshold)
        y = binary.binary_conv2d(
            x,
            self.packed_signs(x.device),
            self.in_channels // self.groups,
            (1, *self.stride),
            (0, padding),
            (1, *self.dilation),
            0,
            epilogue,
        )
        return y if isinstance(epilogue, binary.Thresholds) else y.permute(0, 3, 1, 2).squeeze(2).contiguous()

    def _pack(self, signs: Tensor) -> Tensor:
        return binary.pack_filters(signs.unsqueeze(2))


class QuantisedConv3d(_QuantisedConvolution, nn.Conv3d):
    """nn.Conv3d; the kernels of signs have no such convolution."""


def _pack_input(layer: Any, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """(packed signs as binary_conv2d takes them, padding that is left for it to do)."""
    padding = cast(tuple[int, ...], zero_padding(layer))  # else the layer would not take signs
    if x.dtype == torch.int64:
        return x, padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), (0,) * len(padding)
    image = x.unsqueeze(2) if x.ndim == 3 else x
    return binary.pack_images(image, layer.groups, threshold), padding


def zero_padding(layer: Any) -> tuple[int, ...] | None:
    """Padding of a convolution, if it is the same on both sides of each axis: the kernels of signs know no other."""
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    sides = layer._reversed_padding_repeated_twice
    return tuple(reversed(sides[::2])) if sides[::2] == sides[1::2] else None


_TWINS: dict[type[nn.Module], type[QuantisedLayer]] = {
    nn.Linear: QuantisedLinear,
    nn.Conv1d: QuantisedConv1d,
    nn.Conv2d: QuantisedConv2d,
    nn.Conv3d: QuantisedConv3d,
}


def can_quantise(module: nn.Module) -> bool:
    """Whether `quantise` takes it: Linear and Conv1d/2d/3d themselves, whose forward is known."""
    return type(module) in _TWINS


def quantise(module: nn.Module) -> QuantisedLayer:
    """Turn a layer into its quantised twin, which computes the same until it is given transforms.

    Raises `PlanError` for other kinds of layers, subclasses included: their forward may differ.
    """
    if not can_quantise(module):
        raise PlanError(
            f"a {type(module).__name__} cannot be quantised in training; these can: "
            f"{', '.join(kind.__name__ for kind in _TWINS)}"
        )
    twin = cast(QuantisedLayer, module)
    kind = type(module)
    module.__class__ = _TWINS[kind]
    for name in ("input_quantizer", "output_transform", "step_hook"):
        twin.register_module(name, None)
    for name in ("scale", "input_threshold", "output_threshold", "output_flip"):
        twin.register_buffer(name, None)
    axis = 1 if kind is nn.Linear else 1 + len(cast(Any, module).kernel_size)
    vars(twin).update(takes_signs=False, sample_scale=False, _channel_axis=axis, _words=None)
    return twin


def dequantise(layer: QuantisedLayer) -> nn.Module:
    """Turn a quantised twin without transforms back into the plain layer, in place."""
    for name in _ROLES:
        del layer._modules[name]
    for name in _BUFFERS:
        del layer._buffers[name]
    for name in (*_FLAGS, "_channel_axis", "_words"):
        del vars(layer)[name]
    cast(Any, layer).__class__ = next(kind for kind, twin in _TWINS.items() if twin is type(layer))
    return layer


def weight_chain(module: nn.Module) -> Any:
    """The ParametrizationList of the module's weight, or None."""
    chains = getattr(module, "parametrizations", None)
    return chains["weight"] if chains is not None and "weight" in chains else None


def remove_weight_chain(layer: nn.Module, *, keep_value: bool = False) -> None:
    """Take the transforms off a layer's weight, which becomes its latent weight or, to keep, what they made of it.

    A copy of a layer shares the class that torch made for its transforms, and removing them takes the weight out of
    that class: the layer gets one of its own first, so that the copy goes on.
    """
    kind = type(layer)
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    cast(Any, layer).__class__ = type(kind.__name__, kind.__bases__, own)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep_value)


def last_transform(chain: Any) -> tuple[Any, Tensor]:
    """(last weight transform, its input) of a layer's `weight_chain`."""
    weight = chain.original
    *before, last = chain
    for transform in before:
        weight = transform(weight)
    return last, weight


# ------------------------------------------------------------------------------------------------ in a stored model


def set_sign_input(layer: QuantisedLayer, signs: SignInput) -> None:
    """Have the kernels make the layer's products from now on."""
    layer.input_quantizer = None
    layer.takes_signs, layer.sample_scale = True, signs.sample_scale
    layer.input_threshold = signs.threshold


def remove_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Put identities where a converted model needs a module no more, and remember that for its file."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    removed = {*getattr(model, _REMOVED, ()), *names}
    setattr(model, _REMOVED, sorted(removed))


def structure(model: nn.Module) -> dict[str, Any]:
    """What a converted model is beyond its tensors, as JSON; {} for a model without quantised layers.

    {"layers": {name: {"takes_signs": true, ..., "buffers": [names]}}, "removed": [names], "replaced": {name: entry}},
    the last only if not empty; a layer's transforms are recipe entries. Raises `ArtifactError` if a layer is prepared,
    but not converted.
    """
    layers = {name: _layer_structure(name, m) for name, m in model.named_modules() if isinstance(m, QuantisedLayer)}
    if not layers:
        return {}
    found: dict[str, Any] = {"layers": layers, "removed": list(getattr(model, _REMOVED, ()))}
    replaced = {name: m.made_from for name, m in model.named_modules() if isinstance(m, Replacement) and m.made_from}
    return {**found, "replaced": replaced} if replaced else found


def _layer_structure(name: str, layer: QuantisedLayer) -> dict[str, Any]:
    if weight_chain(layer) is not None:
        raise ArtifactError(f"{name} is prepared for training, but not packed; call pennyweight.convert(model) first")
    found: dict[str, Any] = {flag: True for flag in _FLAGS if getattr(layer, flag)}
    found |= {role: made.made_from for role in _ROLES if (made := getattr(layer, role)) is not None}
    found |= {"no_bias": True} if layer.bias is None else {}
    buffers = [buffer for buffer in _BUFFERS if getattr(layer, buffer) is not None]
    return {**found, "buffers": buffers} if buffers else found


def restore(model: nn.Module, found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give a fresh model the `structure` of a stored one. tensors: those stored, of which shapes alone count.

    Raises `PlanError` or `UnknownNameError` for what this version does not know, AttributeError for missing layers.
    """
    for name, entry in found.get("replaced", {}).items():
        made = registry.get(entry["method"], "layers").target.of(entry, model.get_submodule(name))
        for quantizer_name, quantizer in made.named_children():
            if isinstance(quantizer, LayerTransform):
                _reshape(quantizer, f"{name}.{quantizer_name}.", tensors)
        model.set_submodule(name, made)
    for name, layer in found["layers"].items():
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        _restore_layer(model.get_submodule(name), layer, own)
    for name in found["removed"]:
        model.get_submodule(name)
    remove_modules(model, found["removed"])


def _restore_layer(module: nn.Module, found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if weight_chain(module) is not None:  # of a layer that the model itself makes with transforms
        remove_weight_chain(module, keep_value=True)
    layer = module if isinstance(module, QuantisedLayer) else quantise(module)
    for role in _ROLES:
        if role in found:
            made = make_layer_transform(found[role], layer)
            _reshape(made, f"{role}.", tensors)
            setattr(layer, role, made)
    for name in found.get("buffers", ()):
        if name not in tensors:
            raise AttributeError(f"the layer's {name} is missing")
        setattr(layer, name, torch.empty(tensors[name].shape, dtype=_BUFFERS[name], device=layer.weight.device))
    for flag in _FLAGS:
        setattr(layer, flag, bool(found.get(flag)))
    if found.get("no_bias"):
        layer.bias = None


def _reshape(made: LayerTransform, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Give what was fitted to data the shapes it is stored in."""
    for name, tensor in made.state_dict(keep_vars=True).items():
        stored = tensors.get(prefix + name)
        if stored is not None and stored.shape != tensor.shape:
            tensor.data = torch.empty_like(stored, dtype=tensor.dtype, device=tensor.device)


_REMOVED = "_pennyweight_removed"
_FLAGS = ("takes_signs", "sample_scale")
_ROLES = ("input_quantizer", "output_transform")
_BUFFERS = {
    "scale": torch.float32,
    "input_threshold": torch.float32,
    "output_threshold": torch.int32,
    "output_flip": torch.bool,
}
