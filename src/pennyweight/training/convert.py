"""`convert`: from a trained model to the packed one that is stored and run.

Every prepared layer keeps the codes of its weight, packed (layers/packed.py), and the scale of each output as float32
beside them; latent weights, estimators, noise and all else that only training needs are gone. Where inputs are signs
and weights are, too, the kernels multiply bits. Where such a layer feeds a batch norm and that nothing but the signs of
the next layer, the three become integer thresholds and bits pass between the layers:

    layer of signs -> batch norm -> (Hardtanh, ReLU, Dropout, Identity) -> layer of signs, of the same kind

The model's graph is read by torch.fx; in a model that cannot be traced, batch norms stay. Outputs are those of the
prepared model in eval mode: the same bits for products of signs and thresholds, within 1e-5 elsewhere.

Weights that training has made sparse (`pwd`, `padamw`, `psilon`, pruning) keep their exact zeros as zeros, whether or
not the model was prepared: where the format `sparse` holds the same values in fewer bytes, it does (sparse.py).
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..bundle import round_to_stored, set_exact
from ..compress.observe import evaluating
from ..errors import PlanError, WeightError
from ..formats import Binary, PackedWeight
from ..kernels.binary import Thresholds, find_thresholds
from ..layers.base import LayerTransform, SignInput, make_layer_transform
from ..layers.packed import PackedModule, install
from ..layers.quantised import (
    QuantisedConv1d,
    QuantisedConv2d,
    QuantisedLayer,
    QuantisedLinear,
    last_transform,
    remove_modules,
    remove_weight_chain,
    set_sign_input,
    weight_chain,
    zero_padding,
)
from .sparse import real_weights

#: Modules after a batch norm that keep the order of numbers, so that a sign behind them is a threshold before them.
_ORDER_KEEPING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Hardtanh, nn.ReLU)
#: How far decoded weights, scales multiplied in, may be from those trained, relative to the largest.
_TOLERANCE = 1e-5


@torch.no_grad()
def convert(model: nn.Module, *, half: bool = False) -> nn.Module:
    """Turn a trained model into its packed form, in place, in eval mode, and return it. See the module.

    half: real weights are rounded to half precision, and stored as `dense16` or `sparse`, whichever is smaller.
    Otherwise the result is stored exactly, what is packed and what is not.
    Raises `PlanError` if no layer is prepared and no weight would be smaller as `sparse`, or the model is converted
    already; `WeightError`, naming the layer, if its weights or inputs are not yet what the method promises or hold NaN.
    The model is then as it was.
    """
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise PlanError("the model is converted already")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLayer)}
    if not layers:
        return _convert_plain(model, half)
    with evaluating(model):
        stored = {name: _stored(name, layer) for name, layer in layers.items()}
    model.eval()
    for name, parts in stored.items():
        layer = layers[name]
        layer.step_hook = None
        if weight_chain(layer) is not None:
            remove_weight_chain(layer)
        if parts.weight is not None:  # a new parameter: other layers may share the latent one
            layer.weight = nn.Parameter(parts.weight.detach().clone())
        layer.scale = parts.scale
        if parts.signs is not None and _multiplies_signs(layer, parts.packed):
            set_sign_input(layer, parts.signs)
        elif parts.signs is not None:
            layer.input_quantizer = _plain_signs(layer, parts.signs)
    install(model, {_weight_name(name): p.packed for name, p in stored.items() if p.packed is not None})
    install(model, real_weights(model, half))
    _fold_thresholds(model)
    return model


def _convert_plain(model: nn.Module, half: bool) -> nn.Module:
    """A model without prepared layers, whose weights are sparse or may be rounded."""
    packed = real_weights(model, half)
    if not packed:
        raise PlanError(
            "the model holds no prepared layer, and no weight with enough exact zeros for a smaller file; "
            "prepare(model, recipe) and train it, train it sparse, or shrink it"
        )
    install(model.eval(), packed)
    if half:
        round_to_stored(model)
    else:
        set_exact(model)
    return model


class _Stored(NamedTuple):
    """What is kept of a layer: codes, packed; scales [outputs]; the codes, or the weight not packed; signs it takes."""

    packed: PackedWeight | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    signs: SignInput | None = None


def _weight_name(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _stored(name: str, layer: QuantisedLayer) -> _Stored:
    try:
        signs = None if layer.input_quantizer is None else layer.input_quantizer.sign_input()
        chain = weight_chain(layer)
        if chain is None:
            return _Stored(signs=signs)
        last, weight = last_transform(chain)
        if not bool(torch.isfinite(weight).all()):
            raise WeightError("the weight holds NaN or infinity; training has diverged, go back to a checkpoint")
        packed = last.packed(weight)
        if packed is None:
            return _Stored(weight=last(weight), signs=signs)
        codes, scale = last.factors(weight)
        scale = None if scale is None else scale.float().clone()
        packed, scale = _exact(packed, codes.float().flatten(1), scale)
        if signs is not None:
            packed, scale = _unit_signs(packed, scale)
    except WeightError as error:
        raise WeightError(f"{name}: {error}") from error
    return _Stored(packed, scale, codes, signs)


def _plain_signs(layer: QuantisedLayer, signs: SignInput) -> LayerTransform:
    """The same signs without what only their training needs, for a layer whose weights are not signs."""
    entry = {"method": "sign", "shift": signs.threshold is not None, "sample_scale": signs.sample_scale}
    made = make_layer_transform(entry, layer).eval()
    if signs.threshold is not None:
        cast(Any, made).shift.copy_(-signs.threshold)
    return made


def _exact(packed: PackedWeight, codes: Tensor, scale: Tensor | None) -> tuple[PackedWeight, Tensor | None]:
    """The packed weight, and the scale that makes up for what rounding to its storage has cost, row by row.

    Raises `WeightError` if more than a factor a row is lost.
    """
    decoded = packed.decode().to(codes.device)
    if torch.equal(decoded, codes):
        return packed, scale
    ratio = (codes * decoded).sum(1) / decoded.square().sum(1)
    ratio = torch.where(ratio.isfinite(), ratio, 1.0)
    if float((decoded * ratio[:, None] - codes).abs().max()) > _TOLERANCE * float(codes.abs().max()):
        raise WeightError("the packed weights differ from the trained ones: the method's stored form is not exact")
    return packed, ratio if scale is None else ratio * scale


def _unit_signs(packed: PackedWeight, scale: Tensor | None) -> tuple[PackedWeight, Tensor | None]:
    """Signs of one magnitude a row as signs of 1, the magnitude moved into the scale; others as they are."""
    if not isinstance(packed, Binary):
        return packed, scale
    decoded = packed.decode()
    size = decoded[:, :1].abs()
    if bool((size == 1).all()) or not torch.equal(decoded.abs(), size.expand_as(decoded)):
        return packed, scale
    signs = Binary.from_signs(decoded >= 0, torch.ones_like(size), 0)
    return signs, size[:, 0] if scale is None else scale * size[:, 0]


def _multiplies_signs(layer: QuantisedLayer, packed: PackedWeight | None) -> bool:
    """Whether the kernels of signs can make the product, given that inputs are signs."""
    if not isinstance(packed, Binary) or not isinstance(layer, QuantisedLinear | QuantisedConv1d | QuantisedConv2d):
        return False
    signs = bool((packed.decode().abs() == 1).all())
    return signs and (isinstance(layer, QuantisedLinear) or zero_padding(layer) is not None)


# ---------------------------------------------------------------------------------------------------------- thresholds


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantisedLayer) or super().is_leaf_module(m, module_qualified_name)


def _fold_thresholds(model: nn.Module) -> None:
    """Turn batch norms between layers of signs into thresholds, in place."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for first, norm, *between, last in _paths(model):
        thresholds = _thresholds(first, norm, between, last)
        if thresholds is None:
            continue
        first.output_threshold, first.output_flip = thresholds.threshold, thresholds.flip
        first.scale = first.bias = last.input_threshold = None
        gone = [norm, *(module for module in between if not isinstance(module, nn.Identity))]
        remove_modules(model, [name for module in gone for name in names[module]])


def _paths(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every (layer of signs, batch norm, order-keeping modules, layer of signs) that nothing leaves on its way.

    Of a forward with optional arguments, those that are there with and without them.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    try:
        graphs = [_Tracer().trace(model, concrete_args=given) for given in ([None, defaults] if defaults else [None])]
    except Exception:  # tracing runs the user's forward on stand-ins, which can fail in any way
        return []
    found, *others = ([path for node in graph.nodes if (path := _path(node, model))] for graph in graphs)
    return [path for path in found if all(path in other for other in others)]


def _path(node: fx.Node, model: nn.Module) -> tuple[Any, ...] | None:
    """The path that starts at a node, or None."""
    path: list[Any] = []
    while node.op == "call_module" and sum(other.target == node.target for other in node.graph.nodes) == 1:
        module = model.get_submodule(str(node.target))
        path.append(module)
        if len(path) == 1:
            fits = isinstance(module, QuantisedLayer) and module.takes_signs and not _after_product(module)
        elif len(path) == 2:
            fits = isinstance(module, _BatchNorm) and module.running_mean is not None
        elif isinstance(module, QuantisedLayer):
            return tuple(path) if _takes_bits(path[0], module) else None
        else:
            fits = isinstance(module, _ORDER_KEEPING)
        if not fits or len(node.users) != 1:
            return None
        node = next(iter(node.users))
    return None


def _after_product(layer: QuantisedLayer) -> bool:
    """Whether something other than a scale and a bias an output comes after the product."""
    return layer.sample_scale or layer.output_transform is not None


def _takes_bits(first: QuantisedLayer, last: QuantisedLayer) -> bool:
    """Whether the packed signs that `first` yields are laid out as `last` takes them."""
    if first._channel_axis != last._channel_axis or not last.takes_signs or last.sample_scale:
        return False
    convolution: Any = last
    return isinstance(last, QuantisedLinear) or (convolution.groups == 1 and convolution.padding_mode == "zeros")


def _thresholds(
    first: QuantisedLayer, norm: _BatchNorm, between: list[nn.Module], last: QuantisedLayer
) -> Thresholds | None:
    """Where the signs that `last` sees are +, of the integer products of `first`; None if numbers are not finite."""
    mean = cast(Tensor, norm.running_mean)
    at = 0.0 if last.input_threshold is None else last.input_threshold

    def values(y: Tensor) -> Tensor:
        z = y.float()
        z = z if first.scale is None else z * first.scale
        z = z if first.bias is None else z + first.bias
        z = norm(z.view(1, -1, *[1] * (first._channel_axis - 1)))
        for module in between:
            z = module(z)
        return z.flatten()

    ends = torch.full((2, len(mean)), 2.0**31, device=mean.device) * torch.tensor([[-1.0], [1.0]], device=mean.device)
    if mean.dtype != torch.float32 or not all(bool(values(end).isfinite().all()) for end in ends):
        return None
    return find_thresholds(lambda y: values(y) >= at, len(mean), mean.device)
