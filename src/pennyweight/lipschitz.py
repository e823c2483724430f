"""How much a network can magnify a change of its input: a bound from its weights, an estimate from its Jacobian.

    |f(x) - f(x')|_2 <= L |x - x'|_2

bound       the product of the layers' operator norms, for networks that apply one layer after the other. Of a
            convolution, largest singular value of [out, in * kernel] times sqrt(patches that a pixel can lie in)
estimate    the largest singular value of the Jacobian at given inputs, any network: L is at least that

The path norm (losses/path_norm.py) bounds the same in other norms, largest change in, sum of changes out.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .compress.data import Call, output_tensor, per_sample
from .compress.folding import fold_batch_norm
from .compress.observe import evaluating
from .errors import PlanError
from .layers.chain import chain_of
from .layers.packed import PackedModule
from .layers.psilon_block import CReLU, PSiLONBlock
from .layers.quantised import QuantisedLayer

#: Largest slopes of activations (rounded up in the last digit).
_SLOPES: dict[type[nn.Module], float] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softplus, CReLU), 1.0),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Flatten, nn.Unflatten), 1.0),
    **{nn.Sigmoid: 0.25, nn.GELU: 1.1290, nn.SiLU: 1.0999, nn.Hardswish: 1.5},
}
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
#: Matrices with longer sides get a bound in place of their largest singular value, which would take long.
_LARGEST_SIDE = 2048
_SAMPLES, _OUTPUTS = 16, 128


def operator_norm(matrix: Tensor) -> float:
    """Largest singular value of [rows, cols]; for large matrices sqrt(|W|_1 |W|_inf), which is no less."""
    if min(matrix.shape) <= _LARGEST_SIDE:
        return float(torch.linalg.matrix_norm(matrix.detach().double(), 2))
    size = matrix.detach().double().abs()
    return math.sqrt(float(size.sum(0).max()) * float(size.sum(1).max()))


@torch.no_grad()
def lipschitz_bound(model: nn.Module, example: Call | None = None) -> float:
    """L of the module's docstring in eval mode; the model is not changed.

    model: nested nn.Sequential (or modules that hold nothing but one) of Linear layers, convolutions, PSiLON blocks,
    batch norms, poolings and activations. example: a batch, with which batch norms are folded into the layers before
    them, if those are not packed: that makes the bound tighter. Raises `PlanError` on other modules.
    """
    layers = list(chain_of(model))
    packed = any(isinstance(layer, PackedModule) for layer in layers)
    if example is not None and not packed and any(isinstance(layer, _BatchNorm) for layer in layers):
        model = copy.deepcopy(model)
        fold_batch_norm(model, example)
        layers = list(chain_of(model))
    return math.prod(map(_bound_of, layers))


def _bound_of(layer: Any) -> float:
    if isinstance(layer, QuantisedLayer) and (layer.input_quantizer is not None or layer.takes_signs):
        raise PlanError(f"a {type(layer).__name__} rounds its inputs; a step has no Lipschitz constant")
    if isinstance(layer, nn.Linear):
        return operator_norm(layer.weight)
    if isinstance(layer, _ConvNd):
        return _convolution_bound(layer)
    if isinstance(layer, PSiLONBlock):
        return 1 + operator_norm(layer.linear.weight)
    if isinstance(layer, _BatchNorm) and layer.running_var is not None:
        gain = torch.ones_like(layer.running_var) if layer.weight is None else layer.weight.detach().abs()
        return float((gain / (layer.running_var + layer.eps).sqrt()).max())
    if isinstance(layer, nn.LeakyReLU):
        return max(1.0, abs(layer.negative_slope))
    if isinstance(layer, _POOLS):
        return _pool_bound(layer)
    if isinstance(layer, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1,), (1, 1)):
        return 1.0
    if type(layer) in _SLOPES:
        return _SLOPES[type(layer)]
    raise PlanError(f"a {type(layer).__name__} has no Lipschitz constant known here")


def _convolution_bound(layer: Any) -> float:
    if layer.padding_mode not in ("zeros", "circular"):
        raise PlanError(f"a convolution with padding {layer.padding_mode!r} has no bound known here")
    # Of a transposed convolution [in, out / groups, *kernel] is the weight of its adjoint, whose norm is the same.
    rows = layer.weight.detach().flatten(1)
    size = max(map(operator_norm, rows.chunk(layer.groups)))
    return size * math.sqrt(_patches(layer.kernel_size, layer.stride, layer.dilation))


def _patches(kernel: Any, stride: Any, dilation: Any) -> int:
    """How many patches a pixel lies in at most."""
    return math.prod(k if d > 1 else -(-k // s) for k, s, d in zip(kernel, stride, dilation))


def _pool_bound(layer: Any) -> float:
    axes = int(type(layer).__name__[-2])
    kernel, stride = (v if isinstance(v, tuple) else (v,) * axes for v in (layer.kernel_size, layer.stride))
    overlaps = _patches(kernel, stride, (1,) * axes)
    if "Avg" in type(layer).__name__:
        return math.sqrt(overlaps / math.prod(kernel))  # |mean|^2 <= sum of squares / count
    return math.sqrt(overlaps)


def jacobian_norm(model: nn.Module, call: Call) -> float | None:
    """Largest singular value of d output / d input over the first samples of a batch, in eval mode.

    None where the input is not one floating-point tensor, the output has more than 128 numbers a sample, or inputs are
    quantised on their way, which leaves no true gradient.
    """
    if len(call.tensors()) != 1 or not call.tensors()[0].is_floating_point():
        return None
    rounded = (getattr(m, "input_quantizer", None) is not None or getattr(m, "takes_signs", 0) for m in model.modules())
    if any(rounded):
        return None
    x = call.tensors()[0][:_SAMPLES].detach().clone().requires_grad_()
    batch = Call((x,)) if call.args else Call((), dict.fromkeys(call.kwargs, x))
    with evaluating(model), torch.enable_grad():
        output = per_sample(output_tensor(batch(model)), len(x))
        if output.shape[1] > _OUTPUTS or not output.requires_grad:
            return None
        rows = [torch.autograd.grad(each.sum(), x, retain_graph=True)[0].flatten(1) for each in output.unbind(1)]
    return float(torch.linalg.matrix_norm(torch.stack(rows, 1).double(), 2).max())
