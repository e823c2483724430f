"""The 1-path-norm of a ReLU network: the sum over all paths from an input to an output of the product of |weights|.

Hidden Synergy: L1 Weight Normalization and 1-Path-Norm Regularization, arXiv 2404.19112. With u = 1 at every input,

    layer              u <- |W| u                                |g| u for L1-normalised rows and equal u: no matrix
    CReLU block        u <- u + max(|A|, |B|) u                  (1 + |g|) u
    path norm          sum of u at the outputs                   |g_1| prod (1 + |g_l|) sum_k |g_K,k|

    |f(x) - f(x')|_1 <= path norm * max_i |x_i - x'_i|           for 1-Lipschitz activations; biases do not matter

Of the halves of a CReLU only one is in use at a time, so that the larger of two paths bounds both (`improved`); the
original path norm adds them up, and is far looser.

`path_norm` reads lengths where layers have them and multiplies matrices elsewhere; both are exact. The bound is the
penalty for PSiLON networks, lambda * path_norm(model) beside the loss. (The released objective halves both.)
The gradient of |g| at a length of exactly 0 is 0: a closed block feels no penalty until it opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from ..errors import PlanError
from ..layers.chain import chain_of
from ..layers.norm_free import NORMS
from ..layers.psilon_block import CReLU, PSiLONBlock, l1_norm_of
from ..registry import register
from .base import Penalty

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.Tanh, nn.Identity, nn.Dropout, nn.Flatten)
_OTHERS = "use path_norm_by_forward"


def path_norm(model: nn.Module, *, improved: bool = True) -> Tensor:
    """The scalar 1-path-norm of a network that applies its layers one after the other, differentiable.

    model: nested nn.Sequential (or modules that hold nothing but one) of Linear layers, PSiLON blocks, CReLU and
    activations with slope at most 1 that map 0 to 0. improved: count the larger half of a CReLU instead of both.
    Raises `PlanError` on other modules; `path_norm_by_forward` takes any ReLU network.
    """
    layers = [layer for layer in chain_of(model, _OTHERS) if not isinstance(layer, _ACTIVATIONS)]
    u: Tensor | None = None  # None: 1 at every input
    halves, outputs = False, 0
    for layer in layers:
        if isinstance(layer, CReLU):
            halves = True
        elif isinstance(layer, PSiLONBlock):
            through = _times(layer.linear, u, True, improved)
            u, outputs = through + (1.0 if u is None else u), layer.linear.out_features
        elif isinstance(layer, nn.Linear):
            u, outputs, halves = _times(layer, u, halves, improved), layer.out_features, False
        else:
            raise PlanError(f"a {type(layer).__name__} is no step of a chain of linear layers; {_OTHERS}")
    if u is None:
        raise PlanError(f"{type(model).__name__} has no Linear layer; there are no paths")
    return u.expand(outputs).sum()


def path_norm_by_forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """The original 1-path-norm of any network of linear layers, ReLUs, poolings and sums: what it says of ones with
    |parameters| and without biases, summed over outputs. Differentiable.

    inputs: one sample, [1, ...]; its shape and dtype count. The network must not use CReLU (negative halves would be
    lost). Raises `PlanError` for networks with norms, whose scale depends on the data, and weights under transforms.
    """
    for name, module in model.named_modules():
        if isinstance(module, (*NORMS, CReLU)):
            raise PlanError(f"{name}: a {type(module).__name__} has no path norm by forward; take it out or fold it")
        if parametrize.is_parametrized(module):
            raise PlanError(f"{name}: its weight is under transforms; fold the model first")
    weights = {
        name: torch.zeros_like(value) if name.rpartition(".")[2] == "bias" else value.abs()
        for name, value in model.named_parameters()
    }
    return functional_call(model, weights, (torch.ones_like(inputs),)).sum()


@register("path-norm", acts_on="losses", paper="2404.19112", description="1-path-norm, exact; a Lipschitz bound")
class PathNormPenalty(Penalty):
    """penalty(model) -> scalar: `path_norm`, or `path_norm_by_forward` where an input_shape is given.

    improved: of `path_norm`. input_shape: of one sample, without the batch, for networks that are no chain of linear
    layers (convolutions, sums).
    """

    def __init__(self, improved: bool = True, input_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.improved = improved
        self.input_shape = None if input_shape is None else tuple(input_shape)

    def forward(self, model: nn.Module) -> Tensor:
        if self.input_shape is None:
            return path_norm(model, improved=self.improved)
        return path_norm_by_forward(model, next(model.parameters()).new_ones(1, *self.input_shape))


def _times(layer: nn.Linear, u: Tensor | None, halves: bool, improved: bool) -> Tensor:
    """|W| u: a scalar where every output has the same, else [outputs]. u: [] or [inputs], None for 1."""
    norm = l1_norm_of(layer)
    if norm is not None and norm.pairs == halves and (u is None or u.ndim == 0) and (improved or not halves):
        return cast(Tensor, norm.length).abs() * (1.0 if u is None else u)
    weight = layer.weight.abs()
    if halves:
        first, second = weight.chunk(2, 1)
        weight = torch.maximum(first, second) if improved else first + second
    return weight.sum(1) * (1.0 if u is None else u) if u is None or u.ndim == 0 else weight @ u
