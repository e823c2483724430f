"""MimicNorm: filters of mean zero and one batch norm on the logits, in place of all other norms.

MimicNorm: Weight Mean and Last BN Layer Mimic the Dynamic of Batch Normalization, arXiv 2010.09278.

    weights      W - mean(W) of each output (weights/weight_mean.py), of hidden layers with more than 50 inputs an
                 output, counted with the kernel: neither the stem of 3 channels nor depthwise filters
    logits       BatchNorm without weight and bias before the loss: at most sqrt(C - 1) for C balanced classes
    start        N(0, g / n), n inputs an output, biases 0. g = 2 in residual nets, 2.8 in plain ones: a centred filter
                 does not see the mean of its inputs, and behind ReLUs that leaves 1 - 1/pi of the variance; 2.9339
                 would keep it
    branches     s_k F(x) + shortcut, s_k learned from 1.2^c / k; c layers in the branch, k = 1, 2, ... over the network

Departures. Centring is part of the forward (weights/weight_mean.py says where that differs from the released code).
Which layers are centred differs between its two trainers: this is the one for CIFAR, widened to hidden linear layers,
as the theory has them; `minimum_inputs` moves the line. `projection_scale` is 1 as there; the ImageNet code scales
shortcut convolutions by 1.2. No affine map follows the last norm where classes are few.

With two classes cross-entropy cannot fall below 0.127, with ten below 0.278. Batches need two samples or more, of mixed
classes; accumulated parts are normalised each by itself. Train with a warm-up.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ..errors import PlanError
from ..registry import register
from ..weights.weight_mean import WeightMean
from .norm_free import ScaledOutput, read_graph, remove_norms, replace
from .quantised import QuantisedLayer, weight_chain

#: Factor a layer in a branch makes up for: sqrt(1 / (1 - 1/pi)), rounded as released.
_BRANCH_GAIN = 1.2


class NormalisedLogits(nn.Module):
    """The last layer and the batch norm on its outputs: [samples, ..., features] -> [samples, ..., classes].

    In training each class has mean 0 and (biased) variance 1 over the batch; in eval mode running statistics are used,
    and `fold` puts them into the layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm1d(layer.out_features, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layer(x)
        return self.norm(logits.reshape(-1, logits.shape[-1])).view_as(logits)

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The layer alone, with what the running statistics do to its outputs; itself if it has other weights."""
        if isinstance(self.layer, QuantisedLayer) or weight_chain(self.layer) is not None:
            return self
        layer, norm = self.layer, self.norm
        deviation = (cast(Tensor, norm.running_var) + norm.eps).sqrt()
        bias = torch.zeros_like(deviation) if layer.bias is None else layer.bias
        layer.weight.div_(deviation[:, None])
        layer.bias = nn.Parameter((bias - cast(Tensor, norm.running_mean)) / deviation)
        return layer


@register(
    "mimicnorm",
    acts_on="layers",
    paper="2010.09278",
    description="replaces all norms of a network by centred filters, branch scales and one norm on the logits",
)
def mimicnorm(
    model: nn.Module,
    *,
    centre: bool = True,
    minimum_inputs: int = 50,
    projection_scale: float = 1.0,
    initialise: bool = True,
) -> nn.Module:
    """Convert a network with norms into its MimicNorm form, in place, and return it. It is to be trained from then on.

    centre: register the centred filters; False where a recipe does, in a chain with low-bit weights. minimum_inputs: of
    a centred filter, exclusive. initialise: draw weights anew, from torch's generator. The last Linear is the
    classifier. After training `pennyweight.fold` leaves a network without norms, scales and centring.
    Raises `PlanError` if the model cannot be traced, has no Linear, or is prepared.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)}
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    if not linear:
        raise PlanError(f"this {type(model).__name__} has no Linear layer to normalise the outputs of")
    if any(weight_chain(layer) is not None for layer in layers.values()):
        raise PlanError("the model is prepared already; call mimicnorm first, then prepare with a recipe")
    head, graph = linear[-1], read_graph(model)
    for layer in layers.values():
        if isinstance(layer, _ConvNd) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_channels))
    remove_norms(model, graph)
    for name, layer in layers.items():
        if initialise:
            _initialise(layer, 2.0 if graph.sums or isinstance(layer, nn.Linear) else 2.8)
        if centre and name != head and layer.weight[0].numel() > minimum_inputs and not _transposed(layer):
            parametrize.register_parametrization(layer, "weight", WeightMean())
    for index, found in enumerate(graph.sums, 1):
        scale = _BRANCH_GAIN ** len(found.weighted) / index
        replace(model, found.branch, ScaledOutput(model.get_submodule(found.branch), scale, learn=True))
        if found.shortcut is not None and projection_scale != 1:
            shortcut = ScaledOutput(model.get_submodule(found.shortcut), projection_scale, learn=True)
            replace(model, found.shortcut, shortcut)
    replace(model, head, NormalisedLogits(cast(nn.Linear, layers[head])))
    return model


@torch.no_grad()
def _initialise(layer: Any, gain: float) -> None:
    inputs = layer.weight[0].numel()
    if isinstance(layer, _ConvNd):
        each = layer.in_channels // layer.groups
        inputs = (max(4, each) if layer.groups > 1 else each) * math.prod(layer.kernel_size)
    layer.weight.normal_(0, math.sqrt(gain / inputs))
    if layer.bias is not None:
        layer.bias.zero_()


def _transposed(layer: nn.Module) -> bool:
    """Whether axis 0 of the weight is not the output."""
    return isinstance(layer, nn.modules.conv._ConvTransposeNd)
