"""PSiLON networks for small, noisy tables (arXiv 2404.19112): their 1-path-norm is a product of the layers' lengths.

    psilon_net       Linear, then (hidden - 1) x [ReLU, Linear], ReLU, Linear with a length for each output
    psilon_resnet    Linear, then (hidden - 1) x PSiLONBlock, CReLU, Linear with a length for each output

Train with Adam without weight decay on loss + lambda * path_norm(model) (losses/path_norm.py); standardise inputs.
Released: width 500, hidden 3, peak learning rate 2e-3 for tables and 2e-2 for depth 10, lambda 5e-5 to 0.5. The first
lengths are 1, so that signals start small: either raise `length` to about sqrt(width) or take the larger rate.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.psilon_block import CReLU, PSiLONBlock, psilon_linear


class PSiLONNet(nn.Module):
    """[samples, inputs] -> [samples, outputs]; `layers` in the order they are applied."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def psilon_net(
    inputs: int,
    outputs: int,
    width: int = 500,
    hidden: int = 3,
    *,
    length: float = 1.0,
    sparsify: float | None = None,
    sharpness: float | None = None,
) -> PSiLONNet:
    """The plain network; see the module. sparsify, sharpness: of its weights, see weights/psilon.py."""
    layers: list[nn.Module] = []
    for index in range(hidden):
        sizes = width if index else inputs, width
        layers += [psilon_linear(*sizes, length=length, sparsify=sparsify, sharpness=sharpness), nn.ReLU()]
    layers.append(psilon_linear(width, outputs, shared=False, length=length, sparsify=sparsify, sharpness=sharpness))
    return PSiLONNet(layers)


def psilon_resnet(
    inputs: int,
    outputs: int,
    width: int = 500,
    hidden: int = 10,
    *,
    sparsify: float | None = None,
    sharpness: float | None = None,
) -> PSiLONNet:
    """The residual network; see the module."""
    layers: list[nn.Module] = [psilon_linear(inputs, width, sparsify=sparsify, sharpness=sharpness)]
    layers += [PSiLONBlock(width, sparsify=sparsify, sharpness=sharpness) for _ in range(hidden - 1)]
    last = psilon_linear(2 * width, outputs, shared=False, pairs=True, sparsify=sparsify, sharpness=sharpness)
    return PSiLONNet([*layers, CReLU(), last])
