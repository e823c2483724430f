"""The time of each layer in each form, measured on this machine on the inputs the model gives it.

A layer is the smallest module whose forward reads packed weights: a Linear, a convolution, an embedding, a recurrent
module or an attention with all its weights. Layers alike in kind, sizes and inputs are timed once. Packed forms are
timed as they run with memory="low"; with memory="fast" everything runs as the original does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..clock import median_seconds
from ..layers.forms import ORIGINAL, Form, samples
from ..layers.packed import PackedModule, install_blobs, packed_blobs, set_memory
from ..layers.sites import weight_sites
from ..timing_cache import TimingCache
from .data import Call
from .observe import evaluating

_ROUNDS, _PATIENCE = 40, 0.7  # rounds of the clock, and the seconds after which a layer's are ended
_CONVOLUTION = nn.modules.conv._ConvNd

Progress = Callable[[str, int, int], None]


@dataclass
class Layer:
    """A module whose forward reads weights.

    name: of the module. kind: linear, conv, embedding or recurrent. weights: attribute, as a path below the module ->
    (name of the weight in the model, shape of its matrix); a tied weight has one name in all its layers. calls: its
    different inputs in one forward of the model, by their shapes, with how often they came.
    """

    name: str
    module: nn.Module
    kind: str
    weights: dict[str, tuple[str, tuple[int, int]]]
    calls: dict[str, tuple[Call, int]] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """How the layer's time is shared out to its weights: by their sizes."""
        sizes = {name: rows * cols for name, (rows, cols) in self.weights.values()}
        return {name: size / sum(sizes.values()) for name, size in sizes.items()}

    @property
    def text(self) -> str:
        """What a layer's time depends on, its inputs apart: "Linear in_features=384, ... [1536, 384]"."""
        original = type(self.module)
        if isinstance(self.module, PackedModule):
            original = self.module._packed_original
        sizes = " ".join(str(list(shape)) for _, shape in self.weights.values())
        read = " ".join(filter(None, [original.__name__, original.extra_repr(self.module), sizes]))
        quantised = getattr(self.module, "input_quantizer", None)
        return read if quantised is None else f"{read} quantised inputs"


def find_layers(model: nn.Module, call: Call | None = None) -> list[Layer]:
    """The layers of a model, packed or not; with a call, those it reaches, and what it gives them."""
    names = {alias: site.name for site in weight_sites(model) for alias in (site.name, *site.aliases)}
    names |= {alias: found[0] for found in packed_blobs(model) for alias in found}
    matrices = {site.name: site.view.matrix_shape for site in weight_sites(model)}
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    layers: list[Layer] = []
    for owner in by_module:
        if any(owner.startswith(f"{other}.") for other in by_module if other):
            continue  # read by the forward of a layer that holds this one (attention and its output projection)
        module, weights = model.get_submodule(owner), {}
        for inner, own_names in by_module.items():
            if inner == owner or (owner and inner.startswith(f"{owner}.")):
                holder = model.get_submodule(inner)
                for name in own_names:
                    attribute = name.rpartition(".")[2]
                    shape = matrices.get(names[name])
                    if isinstance(holder, PackedModule) and attribute in holder._packed_views:
                        shape = holder._packed_views[attribute].matrix_shape
                    if shape is not None:
                        weights[name.removeprefix(f"{owner}.")] = (names[name], shape)
        layers.append(Layer(owner, module, _kind(module), weights))
    if call is None:
        return layers
    with _recording(layers), torch.no_grad(), evaluating(model):
        call(model)
    return [layer for layer in layers if layer.calls]


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    return "conv" if isinstance(module, _CONVOLUTION) else "linear"


@contextlib.contextmanager
def _recording(layers: Sequence[Layer]) -> Iterator[None]:
    """While it lasts, layers note what they are called with."""
    handles = [
        layer.module.register_forward_pre_hook(functools.partial(_note, layer), with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = Call(args, kwargs)
    shapes = shapes_text(call)
    known, count = layer.calls.get(shapes, (call, 0))
    layer.calls[shapes] = (known, count + 1)


def shapes_text(call: Call) -> str:
    """By which calls of a layer are told apart: types and shapes of all inputs."""
    return f"{_shapes(call.args)} {_shapes(call.kwargs)}" if call.kwargs else _shapes(call.args)


def _shapes(value: Any) -> str:
    """Inputs as text, tensors by type and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_shapes(v) for v in value)})"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{k}={_shapes(v)}' for k, v in value.items())})"
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__


def time_layer(layer: Layer, call: Call) -> dict[Form, float]:
    """Microseconds of one call of the layer: the original, and packed in each form."""
    made = {attribute: samples(*shape) for attribute, (_, shape) in layer.weights.items()}
    forms = [form for form in next(iter(made.values())) if all(form.family in _families(m) for m in made.values())]
    runs = [functools.partial(call, original_twin(layer.module))]
    for form in forms:
        weights = {attribute: of_form[_nearest(of_form, form)] for attribute, of_form in made.items()}
        # No blob: nothing here is stored, and large tables would take long to encode.
        twin = install_blobs(_twin(layer.module), {a: (w, b"\0") for a, w in weights.items()}, memory="low")
        runs.append(functools.partial(call, twin.eval()))
    seconds = median_seconds(runs, _ROUNDS, patience=_PATIENCE, again=True)
    return {form: 1e6 * taken for form, taken in zip([ORIGINAL, *forms], seconds)}


def time_calls(models: Sequence[nn.Module], call: Call) -> list[float]:
    """Microseconds of one call of each model, or layer, as it is."""
    runs = [functools.partial(call, model) for model in models]
    return [1e6 * taken for taken in median_seconds(runs, _ROUNDS, patience=_PATIENCE, again=True)]


def _families(forms: Mapping[Form, Any]) -> set[str]:
    return {form.family for form in forms}


def _nearest(forms: Mapping[Form, Any], wanted: Form) -> Form:
    """Of the same family: several weights of a layer differ in columns, and so in groups and ranks."""
    rank = sorted(f.at for f in forms if f.family == wanted.family)
    return Form(wanted.family, min(rank, key=lambda at: abs(at - wanted.at)))


def _twin(module: nn.Module) -> nn.Module:
    """A copy that shares its tensors."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def original_twin(module: nn.Module) -> nn.Module:
    """A copy of a layer, or model, with nothing packed: decoded weights in layers of the classes they had."""
    twin = _twin(module)
    for part in twin.modules():
        if isinstance(part, PackedModule):
            weights = {attribute: part.decoded_weight(attribute) for attribute in part._packed_views}
            for name in [n for a in weights for n in part._buffers if n.startswith(a)]:
                part._buffers.pop(name, None)
                part._non_persistent_buffers_set.discard(name)
            part.__class__ = part._packed_original  # pyright: ignore[reportAttributeAccessIssue]
            for attribute, weight in weights.items():
                part.register_parameter(attribute, nn.Parameter(weight, requires_grad=False))
            if isinstance(part, nn.RNNBase):
                part._init_flat_weights()
    return twin.eval()


def packed_twin(module: nn.Module) -> nn.Module:
    """A copy of a packed layer that runs from what is packed."""
    twin = _twin(module)
    set_memory(twin, "low")
    return twin.eval()


def whole_and_rest(model: nn.Module, layers: Sequence[Layer], call: Call, cache: TimingCache) -> tuple[float, float]:
    """Microseconds of one call of the model as it was, and what of it is spent outside the layers.

    The layers' share is taken by the clock in the forward itself, where weights come from memory: that of layers timed
    alone, from warm caches, would be too small, and the rest too large.
    """
    calls = [(key, count) for layer in layers for key, (_, count) in _keyed(layer)]
    text = json.dumps([shapes_text(call), *sorted(calls)])
    name = f"{type(model).__qualname__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name not in cache.times:
        plain = original_twin(model)
        clocked, spent, started = _twin(plain), [0.0], [0.0]

        def enter(*_: Any) -> None:
            started[0] = time.perf_counter()

        def leave(*_: Any) -> None:
            spent[-1] += time.perf_counter() - started[0]

        for layer in layers:
            module = clocked.get_submodule(layer.name)
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)

        def run() -> None:
            spent.append(0.0)
            call(clocked)

        runs = [functools.partial(call, plain), run]
        whole, _ = median_seconds(runs, _ROUNDS, patience=2 * _PATIENCE, again=True)
        rest = max(whole - statistics.median(spent[1:]), 0.0)
        cache.add(name, {ORIGINAL: 1e6 * whole, Form("rest"): 1e6 * rest})
        cache.save()
    return cache.times[name][ORIGINAL], cache.times[name][Form("rest")]


def _keyed(layer: Layer) -> Iterator[tuple[str, tuple[Call, int]]]:
    """The layer's calls under the names by which their times are kept."""
    return ((f"{layer.text} <- {shapes}", found) for shapes, found in layer.calls.items())


def layer_times(
    layers: Sequence[Layer], cache: TimingCache, progress: Progress = lambda what, done, total: None
) -> Iterator[tuple[Layer, int, dict[Form, float]]]:
    """(layer, how often, microseconds of one call by form) for all calls of the layers; measures what is not known."""
    wanted = [(layer, key, *found) for layer in layers for key, found in _keyed(layer)]
    distinct = list(dict.fromkeys(key for _, key, _, _ in wanted))
    for layer, key, call, count in wanted:
        if key not in cache.times:
            cache.add(key, time_layer(layer, call))
        progress("timing", distinct.index(key) + 1, len(distinct))
        yield layer, count, cache.times[key]
    cache.save()


def packed_and_original(
    model: nn.Module, call: Call, progress: Progress = lambda what, done, total: None
) -> dict[str, tuple[float, float]]:
    """Of each weight of a packed model that the call reaches: microseconds in one forward as it is packed, and those it
    would take unpacked. Always measured, never taken from the cache."""
    found: dict[str, tuple[float, float]] = {}
    layers = find_layers(model, call)
    for done, layer in enumerate(layers):
        twins = [packed_twin(layer.module), original_twin(layer.module)]
        for inputs, count in layer.calls.values():
            now, before = time_calls(twins, inputs)
            for name, share in layer.shares.items():
                known = found.get(name, (0.0, 0.0))
                found[name] = (known[0] + count * share * now, known[1] + count * share * before)
        progress("timing", done + 1, len(layers))
    return found
