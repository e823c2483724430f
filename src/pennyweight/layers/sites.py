"""Weight sites: the parameters of a model that can be packed, each seen as a matrix.

A site is one parameter of a known layer. Its matrix has one row for each output (Linear, convolution, recurrent
gate) or table entry (Embedding), so that a packed weight never needs to know which layer it came from:

    Linear, attention projections, recurrent weights    [out, in]            as stored
    Embedding, EmbeddingBag                             [entries, features]  as stored
    Conv1d/2d/3d                [out, in/groups, *kernel]            -> [out, in/groups * kernel]
    ConvTranspose1d/2d/3d       [in, out/groups, *kernel]            -> [out, in/groups * kernel], rows group by group
    transformers' Conv1D        [in, out]                            -> [out, in]

Parameters of other modules (norms, biases, positions held as bare parameters) are no sites: they are stored with the
rest of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT_WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class MatrixView:
    """How a parameter of a given shape is read as a matrix, and back.

    shape: the parameter's shape. order: "rows first" (outputs on axis 0), "columns first" ([in, out]) or
    "transposed convolution" ([in, out/groups, *kernel]). groups: of the convolution, 1 elsewhere.
    """

    shape: tuple[int, ...]
    order: str = "rows first"
    groups: int = 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        if self.order == "rows first":
            return self.shape[0], math.prod(self.shape[1:])
        if self.order == "columns first":
            return self.shape[1], self.shape[0]
        rows = self.shape[1] * self.groups
        return rows, math.prod(self.shape) // rows

    def to_matrix(self, weight: Tensor) -> Tensor:
        """[rows, cols], float32, contiguous. May share memory with the weight."""
        weight = weight.detach().to(torch.float32)
        if self.order == "columns first":
            weight = weight.T
        elif self.order == "transposed convolution":
            inputs, outputs, *kernel = self.shape  # outputs of one group
            weight = weight.reshape(self.groups, inputs // self.groups, outputs, *kernel).transpose(1, 2)
        return weight.reshape(self.matrix_shape).contiguous()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The parameter's shape from [rows, cols]; keeps dtype and device."""
        if self.order == "columns first":
            return matrix.T.contiguous()
        if self.order == "transposed convolution":
            inputs, outputs, *kernel = self.shape
            grouped = matrix.reshape(self.groups, outputs, inputs // self.groups, *kernel)
            return grouped.transpose(1, 2).reshape(self.shape).contiguous()
        return matrix.reshape(self.shape)


@dataclass(frozen=True)
class WeightSite:
    """One packable parameter.

    name: the parameter's name in the model's state dict. module_name, module: the layer that holds it. parameter: the
    tensor itself. kind: linear, conv, embedding or recurrent. groups: of a grouped convolution (rows are split
    evenly over the groups, in order). aliases: further state-dict names of the same (tied) parameter. view: how the
    parameter is read as a matrix.
    """

    name: str
    module_name: str
    parameter: nn.Parameter
    module: nn.Module
    kind: str
    groups: int
    aliases: tuple[str, ...]
    view: MatrixView

    @property
    def attribute(self) -> str:
        """The parameter's name within its module."""
        return self.name.rpartition(".")[2]

    def matrix(self) -> Tensor:
        """The weight as a new float32 tensor [rows, cols]."""
        matrix = self.view.to_matrix(self.parameter)
        return matrix.clone() if matrix.data_ptr() == self.parameter.data_ptr() else matrix

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """A matrix [rows, cols] in the parameter's shape, dtype and device."""
        return self.view.from_matrix(matrix).to(self.parameter)


def weight_sites(model: nn.Module) -> list[WeightSite]:
    """The sites of a model, in the order of its modules. A tied weight is one site, its other names are aliases.

    Left out: empty weights, weights whose subclass gives them another shape, parametrized and already packed weights.
    """
    names: dict[nn.Parameter, list[str]] = {}
    found: list[tuple[str, nn.Module, nn.Parameter, str, MatrixView]] = []
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, kind, view in _views(module):
            parameter = module._parameters[attribute]
            if not _is_packable(parameter) or tuple(parameter.shape) != view.shape:
                continue
            if parameter not in names:
                found.append((module_name, module, parameter, kind, view))
            names.setdefault(parameter, []).append(f"{module_name}.{attribute}" if module_name else attribute)
    return [
        WeightSite(
            names[parameter][0], module_name, parameter, module, kind, view.groups, tuple(names[parameter][1:]), view
        )
        for module_name, module, parameter, kind, view in found
    ]


def _is_packable(parameter: nn.Parameter | None) -> TypeGuard[nn.Parameter]:
    return (
        parameter is not None
        and not isinstance(parameter, UninitializedParameter)
        and parameter.is_floating_point()
        and parameter.numel() > 0
    )


def _views(module: nn.Module) -> Iterator[tuple[str, str, MatrixView]]:
    """(attribute, kind, view with the shape this type of layer must have) of each weight of a known layer."""
    if isinstance(module, nn.Linear):
        wanted = {"weight": ("linear", MatrixView((module.out_features, module.in_features)))}
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        wanted = {"weight": ("embedding", MatrixView((module.num_embeddings, module.embedding_dim)))}
    elif isinstance(module, _CONVOLUTIONS):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        wanted = {"weight": ("conv", MatrixView(shape, groups=module.groups))}
    elif isinstance(module, _TRANSPOSED_CONVOLUTIONS):
        shape = (module.in_channels, module.out_channels // module.groups, *module.kernel_size)
        wanted = {"weight": ("conv", MatrixView(shape, "transposed convolution", module.groups))}
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        wanted = _as_stored(module, "recurrent", _RECURRENT_WEIGHT.fullmatch)
    elif isinstance(module, nn.MultiheadAttention):
        wanted = _as_stored(module, "linear", ATTENTION_WEIGHTS.__contains__)
    elif _is_transformers_conv1d(module):
        weight = module._parameters.get("weight")
        shape = tuple(weight.shape) if weight is not None and weight.ndim == 2 else ()
        wanted = {"weight": ("linear", MatrixView(shape, "columns first"))}
    else:
        wanted = {}
    for attribute, (kind, view) in wanted.items():
        if attribute in module._parameters:
            yield attribute, kind, view


def _as_stored(module: nn.Module, kind: str, is_weight: Callable[[str], object]) -> dict[str, tuple[str, MatrixView]]:
    return {
        attribute: (kind, MatrixView(tuple(parameter.shape)))
        for attribute, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 2 and is_weight(attribute)
    }


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """transformers.pytorch_utils.Conv1D or a subclass, told by name so that transformers need not be imported."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)
