"""What networks without norms are made of: scaled branches, where residual sums are, and taking the norms out."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import PlanError
from .quantised import QuantisedLayer, weight_chain

NORMS = (_BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
_LAYERS = (nn.Linear, _ConvNd)
_SUMS = ("add", "iadd", "add_")


class ScaledOutput(nn.Module):
    """scale * module(x): the end of a residual branch. `fold` puts the scale into the layer that the module ends with.

    scale: a number, trained if `learn`. Any arguments are passed on to the module.
    """

    scale: Tensor

    def __init__(self, module: nn.Module, scale: float, learn: bool = False) -> None:
        super().__init__()
        self.module = module
        value = torch.tensor(float(scale))
        if learn:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self.module(*args, **kwargs)
        return y * self.scale.to(y.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The module, its last layer scaled; itself if that is no plain Linear, convolution or norm with a weight."""
        last = self.module
        while isinstance(last, nn.Sequential) and len(last):
            last = last[-1]
        plain = isinstance(last, (*_LAYERS, *NORMS)) and last.weight is not None
        if not plain or isinstance(last, QuantisedLayer) or weight_chain(last) is not None:
            return self
        for parameter in last.parameters(recurse=False):  # weight and bias
            parameter.mul_(self.scale.to(parameter.dtype))
        return self.module

    def extra_repr(self) -> str:
        return f"scale={float(self.scale):.4g}, learn={isinstance(self.scale, nn.Parameter)}"


class ResidualSum(NamedTuple):
    """end: the module whose output is the branch. branch, shortcut: the same with norms at the end left out; None where
    the shortcut is no module. weighted: layers with weights in the branch, from its input to the sum."""

    end: str
    branch: str
    shortcut: str | None
    weighted: tuple[str, ...]


class Graph(NamedTuple):
    """sums: in the order they are computed. before_norms: layers whose output goes into a norm."""

    sums: tuple[ResidualSum, ...]
    before_norms: tuple[str, ...]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = isinstance(m, (*_LAYERS, *NORMS, ScaledOutput)) or weight_chain(m) is not None
        return leaves or super().is_leaf_module(m, module_qualified_name)


def read_graph(model: nn.Module) -> Graph:
    """Where the model adds a branch to a shortcut, read by torch.fx; optional arguments are left at their defaults.

    Of two summands, the branch is the one with more layers with weights of its own. Raises `PlanError` if the model
    cannot be traced, if both have as many, or if a branch does not end in a module that is called once.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        graph = _Tracer().trace(model, concrete_args=defaults or None)
    except Exception as error:  # tracing runs the user's forward on stand-ins, which can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(
            f"{type(model).__name__} cannot be traced ({reason}); build its residual blocks with "
            "pennyweight.layers.residual_scaling.ScaledResidual instead"
        ) from error
    nodes = list(graph.nodes)
    reach: dict[fx.Node, int] = {}  # bit i: node i is the node itself or comes before it
    for index, node in enumerate(nodes):
        reach[node] = 1 << index
        for source in node.all_input_nodes:
            reach[node] |= reach[source]

    def module(node: fx.Node) -> nn.Module | None:
        return model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def layers(only: int) -> tuple[str, ...]:
        inside = (node for index, node in enumerate(nodes) if only >> index & 1)
        return tuple(str(node.target) for node in inside if isinstance(module(node), (*_LAYERS, ScaledOutput)))

    def end(node: fx.Node) -> fx.Node:
        while isinstance(module(node), NORMS):
            node = node.all_input_nodes[0]
        return node

    sums = []
    for node in nodes:
        summands = [argument for argument in node.args if isinstance(argument, fx.Node)]
        if getattr(node.target, "__name__", node.target) not in _SUMS or len(summands) != 2:
            continue
        first, second = summands
        if not reach[first] & reach[second]:
            continue  # a parameter is added
        own = [layers(reach[first] & ~reach[second]), layers(reach[second] & ~reach[first])]
        if not any(own):
            continue
        if len(own[0]) == len(own[1]):
            raise PlanError(f"the sum {node.name!r}: which of {own[0][-1]} and {own[1][-1]} ends the branch is unclear")
        branch, shortcut = (first, second) if len(own[0]) > len(own[1]) else (second, first)
        last = end(branch)
        if last.op != "call_module" or sum(other.target == last.target for other in nodes) != 1:
            raise PlanError(f"the branch of the sum {node.name!r} ends in {last.name!r}, no module called once")
        around = end(shortcut)
        name = str(around.target) if around.op == "call_module" and any(sorted(own, key=len)[0]) else None
        sums.append(ResidualSum(str(branch.target), str(last.target), name, max(own, key=len)))
    before = (end(node) for node in nodes if isinstance(module(node), NORMS))
    return Graph(tuple(sums), tuple(str(node.target) for node in before if isinstance(module(node), _LAYERS)))


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def remove_norms(model: nn.Module, graph: Graph) -> None:
    """Put identities in the place of all norms, in place; layers before them get a bias of zeros if they have none."""
    for name in graph.before_norms:
        layer = cast(Any, model.get_submodule(name))
        if layer.bias is None:
            outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            layer.bias = nn.Parameter(layer.weight.new_zeros(outputs))
    for name in [name for name, module in model.named_modules() if isinstance(module, NORMS)]:
        replace(model, name, nn.Identity())
