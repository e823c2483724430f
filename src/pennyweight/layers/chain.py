"""Networks that apply one layer after the other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import PlanError
from .psilon_block import PSiLONBlock


def chain_of(module: nn.Module, instead: str = "") -> Iterator[nn.Module]:
    """The layers of nested nn.Sequential, or of modules that hold nothing but one, in order.

    A PSiLON block counts as a layer. instead: what the error advises. Raises `PlanError` on any other network.
    """
    children = list(module.children())
    if isinstance(module, nn.Linear | _ConvNd | PSiLONBlock) or not children:
        yield module
    elif isinstance(module, nn.Sequential):
        for child in children:
            yield from chain_of(child, instead)
    elif len(children) == 1 and isinstance(children[0], nn.Sequential) and not list(module.parameters(recurse=False)):
        yield from chain_of(children[0], instead)
    else:
        advice = f"; {instead}" if instead else ""
        raise PlanError(f"a {type(module).__name__} is no step of a chain of layers{advice}")
