"""`pennyweight bench here`: what each layer of a model takes on this machine, in each format, at given batch sizes.

    found = time_here(model, batches, [1, 32])
    found.rows[0].microseconds[Form("int4", 1)], found.rows[0].ratio(Form("int4", 1))

Layers get inputs the model gives them, cut to so many rows (repeated where there are fewer): positions of a Linear,
entries looked up in an embedding, samples of a convolution, sequences of a recurrent layer or an attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.data import Call, calls, resized
from ..compress.layer_times import Layer, find_layers, layer_times, shapes_text
from ..errors import DataError, WeightError
from ..layers.forms import ORIGINAL, Form
from ..timing_cache import TimingCache


@dataclass(frozen=True)
class Timed:
    """Equal layers at one batch size. layers: their names. batch: rows. microseconds: of one call, by form."""

    layers: list[str]
    kind: str
    shape: tuple[int, ...]
    batch: int
    microseconds: dict[Form, float]

    def ratio(self, form: Form) -> float:
        """Time in that form over that of the layer as it is: above 1 it is slower."""
        return self.microseconds[form] / self.microseconds[ORIGINAL]


@dataclass(frozen=True)
class Bench:
    """machine: processor, instruction set, versions, threads. left_out: layers that the data does not reach."""

    machine: dict[str, Any]
    rows: list[Timed]
    left_out: list[str]
    cache: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "machine": self.machine,
            "layers": [
                {
                    "layers": row.layers,
                    "kind": row.kind,
                    "shape": list(row.shape),
                    "batch": row.batch,
                    "formats": {
                        str(form): {"microseconds": taken, "ratio": row.ratio(form)}
                        for form, taken in row.microseconds.items()
                    },
                }
                for row in self.rows
            ],
            "left_out": self.left_out,
            "cache": self.cache,
        }


def time_here(
    model: nn.Module,
    data: Any,
    batch_sizes: Sequence[int],
    fresh: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Bench:
    """Time the layers of a model, packed or not. data: batches as `shrink` takes them; the first one is run.

    fresh: measure anew what the cache knows. Raises DataError on empty data and batch sizes below 1, WeightError if the
    model has no layer that can be packed.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise DataError(f"batch sizes {list(batch_sizes)} make no sense; give 1 or more rows")
    every = [layer.name for layer in find_layers(model)]
    reached = find_layers(model, calls(model, data)[0])
    if not reached:
        raise WeightError(f"{type(model).__name__} has no layer that can be packed and that the data reaches")
    cache, rows = TimingCache(fresh), []
    cut = [(n, [_with_rows(layer, n) for layer in reached]) for n in dict.fromkeys(batch_sizes)]
    batch_of = {id(layer): n for n, layers in cut for layer in layers}
    grouped: dict[tuple[int, str], Timed] = {}
    for layer, _, taken in layer_times([layer for _, layers in cut for layer in layers], cache, progress):
        batch = batch_of[id(layer)]
        shapes = [shape for _, shape in layer.weights.values()]
        known = grouped.setdefault(
            (batch, f"{layer.text} {next(iter(layer.calls))}"),
            Timed([], layer.kind, max(shapes, key=lambda s: s[0] * s[1]), batch, taken),
        )
        known.layers.append(layer.name)
    rows = sorted(grouped.values(), key=lambda row: batch_sizes.index(row.batch))
    names = {layer.name for layer in reached}
    return Bench(cache.machine, rows, [name for name in every if name not in names], str(cache.path))


def _with_rows(layer: Layer, rows: int) -> Layer:
    """The layer with one call of so many rows, made from the first it got."""
    call, _ = next(iter(layer.calls.values()))
    module = layer.module
    if isinstance(module, nn.MultiheadAttention):
        made = _along(call, 0 if module.batch_first else 1, rows)
    elif layer.kind == "recurrent":
        whole = not isinstance(module, nn.RNNBase) or module.batch_first
        made = _along(Call(call.args[:1]), 0 if whole else 1, rows)  # initial states: zeros, as by default
    elif layer.kind == "conv" or isinstance(module, nn.EmbeddingBag):
        made = resized(call, rows)
    else:
        x = (call.args or tuple(call.kwargs.values()))[0]
        made = resized(Call((x.flatten() if layer.kind == "embedding" else x.reshape(-1, x.shape[-1]),)), rows)
    return replace(layer, calls={shapes_text(made): (made, 1)})


def _along(call: Call, dim: int, rows: int) -> Call:
    """`resized` along another dimension; packed sequences and masks stay away, as they would have to fit."""

    def cut(value: Any) -> Any:
        if isinstance(value, nn.utils.rnn.PackedSequence):
            value = nn.utils.rnn.pad_packed_sequence(value, batch_first=dim == 0)[0]
        if not isinstance(value, Tensor) or value.ndim <= dim:
            return value
        return value.index_select(dim, torch.arange(rows) % value.shape[dim])

    kept = {k: v for k, v in call.kwargs.items() if not k.endswith("mask")}
    return Call(tuple(map(cut, call.args)), {k: cut(v) for k, v in kept.items()})
