"""Which weights make up the final homogeneous sub-network: the longest end of a network whose logits grow as c^a when
one weight tensor is multiplied by c > 0 (biases aside).

It is read off autograd's graph of one forward pass, from the logits backwards, so it does not matter how the model is
written. The walk goes on through linear layers, convolutions, ReLU and its kin, max and mean pooling, dropout,
reshaping, constant factors and added biases, and a final (log-)softmax. It stops at everything else: norms, sigmoid,
tanh, GELU, attention, embeddings, the sum of two branches, and weights that are computed from others.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError

#: Nodes of autograd's graph by the names of their operators, without "Backward0".
_LINEAR = {"Addmm", "Mm", "Linear", "Convolution", "MkldnnConvolution", "Bmm", "Mv", "Addmv"}
_HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "Prelu", "PreluKernel", "Neg", "Mul", "Div", "Add", "Sub", "Sum", "Mean", "NativeDropout"}
    | {"MaxPool1D", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D", "AdaptiveMaxPool2D"}
    | {"AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D", "ConstantPadNd", "Clone", "ToCopy", "Alias"}
    | {"View", "ReshapeAlias", "UnsafeView", "AsStrided", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze", "Expand"}
    | {"Slice", "Select", "Split", "Index"}
)
_RESHAPE = {"T", "Transpose", "Permute", "View", "ReshapeAlias", "UnsafeView", "ToCopy", "Expand", "Alias", "Unsqueeze"}
_LOGITS_OF = {"LogSoftmax", "Softmax"}


def homogeneous_weights(logits: Tensor) -> list[Tensor]:
    """The weights (tensors of two dimensions or more), from the logits backwards. logits: with their graph."""
    node: Any = logits.grad_fn
    if node is not None and _operator(node) in _LOGITS_OF:
        node = _inputs(node)[0]
    found: list[Tensor] = []
    while node is not None:
        operator = _operator(node)
        if operator not in _LINEAR | _HOMOGENEOUS:
            break
        leaves = [_leaf(branch) for branch in _inputs(node)]
        branches = [branch for branch, leaf in zip(_inputs(node), leaves) if leaf is None]
        if len(branches) > 1:
            break
        weights = [leaf for leaf in leaves if leaf is not None and leaf.ndim >= 2]
        if operator in _LINEAR:
            found += [weight for weight in weights if not any(weight is known for known in found)]
        elif weights:  # a gain or a table of weights that is no layer's
            break
        node = branches[0] if branches else None
    return found


def final_homogeneous(model: nn.Module, *inputs: Any, **keywords: Any) -> list[str]:
    """Parameter names of the final homogeneous sub-network, from the logits backwards; inputs: those of `model`.

    Needed before a model is compiled or sharded, which hides the graph. Raises PlanError if there are none.
    """
    with torch.enable_grad():
        weights = homogeneous_weights(logits_of(model(*inputs, **keywords)))
    names = [name for weight in weights for name, parameter in model.named_parameters() if parameter is weight]
    if not names:
        raise PlanError(
            f"{type(model).__name__}: its logits come from no linear layer or convolution; name the layers instead"
        )
    return names


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: the tensor itself, `.logits`, or the first of a sequence."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise PlanError(f"the model returns {type(output).__name__}, in which no logits are known; name the layers instead")


def _operator(node: Any) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


def _inputs(node: Any) -> list[Any]:
    return [branch for branch, _ in node.next_functions if branch is not None]


def _leaf(node: Any) -> Tensor | None:
    """The parameter that a branch is, perhaps reshaped or cast."""
    while True:
        if hasattr(node, "variable"):
            return node.variable
        inputs = _inputs(node)
        if _operator(node) not in _RESHAPE or len(inputs) != 1:
            return None
        node = inputs[0]
