"""The inputs of a layer, as the rows its weight matrix multiplies.

For each kind of site: `input_rows(site, inputs) -> [groups, n, cols]`, so that the layer's output is rows @ matrix^T,
group by group, and `output_rows(site, output) -> [n, rows]` in the same order of positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.sites import ATTENTION_WEIGHTS, WeightSite

#: Positions of a convolution are unfolded in chunks of at most this many float32 values.
_CHUNK_VALUES = 1 << 24

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def is_observable(site: WeightSite) -> bool:
    """Whether the layer's inputs can be seen as rows (else only its weight and gradient are known)."""
    module = site.module
    if site.kind == "recurrent":
        return isinstance(module, _RECURRENT) and "_hr" not in site.attribute
    if isinstance(module, nn.MultiheadAttention):
        return site.attribute in ATTENTION_WEIGHTS
    return site.attribute == "weight"


def input_rows(site: WeightSite, inputs: tuple[Any, ...], output: Tensor | None = None) -> Iterator[tuple[Tensor, Any]]:
    """Yield (rows float32 [groups, n, cols], the same positions of `output` as [n, rows] or None), chunk by chunk.

    inputs: the positional arguments of the module's forward. A weight that projects queries, keys and values gets the
    rows of all three where they differ.
    """
    module, x = site.module, inputs[0]
    if site.kind == "recurrent":
        for rows in _recurrent_rows(site, inputs):
            yield rows[None], None
    elif site.kind == "conv":
        sample_values = max(1, site.view.matrix_shape[1] * site.groups * _output_positions(module, x))
        step = max(1, _CHUNK_VALUES // sample_values)
        for i in range(0, x.shape[0], step):
            rows = patches(module, x[i : i + step].detach().float())
            yield rows, None if output is None else output[i : i + step].flatten(2).transpose(1, 2).flatten(0, 1)
    elif isinstance(module, nn.MultiheadAttention):
        at = ATTENTION_WEIGHTS.index(site.attribute)
        for read in {id(x): x for x in (inputs[:3] if at == 0 else inputs[at - 1 : at])}.values():
            yield read.detach().float().reshape(1, -1, read.shape[-1]), None
    else:
        rows = x.detach().float().reshape(1, -1, x.shape[-1])
        yield rows, None if output is None else output.reshape(-1, output.shape[-1])


def _output_positions(module: Any, x: Tensor) -> int:
    """Positions of the output a sample, near enough to choose a chunk size."""
    positions = x[0, 0].numel()
    for stride in module.stride:
        positions = positions * int(stride) if isinstance(module, _TRANSPOSED) else -(-positions // int(stride))
    return positions


def patches(module: Any, x: Tensor) -> Tensor:
    """What a convolution of any dimension multiplies with its kernel: [groups, batch * positions, in/groups * kernel].

    x: [batch, in, *size]. A transposed convolution is seen as the plain one over its input with zeros put between
    (stride) and around the values; its kernel runs backwards there, so the patch is flipped to fit the weight's order.
    """
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    dims = len(kernel)
    transposed = isinstance(module, _TRANSPOSED)
    if transposed:
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride)))
        spread[(..., *(slice(None, None, s) for s in stride))] = x
        pads = [
            (d * (k - 1) - p, d * (k - 1) - p + o)
            for d, k, p, o in zip(dilation, kernel, module.padding, module.output_padding)
        ]
        x, steps = spread, (1,) * dims
        mode = "constant"
    else:
        steps = stride
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        pads = _paddings(module)
    flat = [p for pair in reversed(pads) for p in pair]
    x = F.pad(x, flat, mode=str(mode)) if any(flat) else x
    for axis in range(dims):
        x = x.unfold(2 + axis, int(dilation[axis]) * (int(kernel[axis]) - 1) + 1, int(steps[axis]))
    x = x[(..., *(slice(None, None, int(d)) for d in dilation))]
    if transposed:
        x = x.flip(tuple(range(-dims, 0)))
    batch, channels = x.shape[:2]
    groups = int(module.groups)
    x = x.reshape(batch, groups, channels // groups, *x.shape[2:])
    order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))  # groups, batch, positions, channels, kernel
    x = x.permute(order)
    return x.reshape(groups, -1, channels // groups * math.prod(x.shape[-dims:]))


def _paddings(module: Any) -> list[tuple[int, int]]:
    padding = module.padding
    if padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if padding == "same":
        totals = [int(d) * (int(k) - 1) for d, k in zip(module.dilation, module.kernel_size)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(int(p), int(p)) for p in padding]


def _recurrent_rows(site: WeightSite, inputs: tuple[Any, ...]) -> Iterator[Tensor]:
    """Inputs of one weight of an LSTM, GRU or RNN: what its layer reads (weight_ih) or its own last state (weight_hh).

    Lower layers are run again, one at a time, to get what they hand on. Initial states count as zeros.
    """
    module = site.module
    assert isinstance(module, _RECURRENT)
    x = inputs[0]
    if isinstance(x, nn.utils.rnn.PackedSequence):
        x, _ = nn.utils.rnn.pad_packed_sequence(x, batch_first=module.batch_first)
    if x.ndim == 2:
        x = x.unsqueeze(0 if module.batch_first else 1)
    x = (x.transpose(0, 1) if module.batch_first else x).detach().float()  # [time, batch, features]
    _, which, layer_text, *reverse = site.attribute.split("_")
    layer = int(layer_text.removeprefix("l"))
    for index in range(layer + 1):
        if index == layer and which == "ih":
            yield x.reshape(-1, x.shape[-1])
            return
        single = _single_layer(module, index)
        with torch.no_grad():
            x = single(x)[0]
    directions = 2 if module.bidirectional else 1
    states = x.chunk(directions, dim=-1)[1 if reverse else 0]
    zero = states.new_zeros(1, *states.shape[1:])
    previous = torch.cat([states[1:], zero]) if reverse else torch.cat([zero, states[:-1]])
    yield previous.reshape(-1, previous.shape[-1])


def _single_layer(module: Any, index: int) -> nn.RNNBase:
    directions = 2 if module.bidirectional else 1
    width = module.proj_size or module.hidden_size
    options: dict[str, Any] = {"bias": module.bias, "bidirectional": module.bidirectional}
    if isinstance(module, nn.LSTM):
        options["proj_size"] = module.proj_size
    if isinstance(module, nn.RNN):
        options["nonlinearity"] = module.nonlinearity
    single = type(module)(module.input_size if index == 0 else width * directions, module.hidden_size, **options)
    with torch.no_grad():
        for name, parameter in single.named_parameters():
            parameter.copy_(getattr(module, name.replace("_l0", f"_l{index}")))
    return single.eval()
