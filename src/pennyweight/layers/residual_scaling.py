"""Residual scaling: branches times 1/sqrt(n) or 1/n let deep networks train without norms.

On residual network depth, arXiv 2510.03470. n blocks z <- z + lambda F_i(z) from z_0 = E(x) to f = D(z_n), D linear:

    f = D z + lambda sum_i D F_i(z) + lambda^2 sum_{i<j} D F_j'(z)[F_i(z)] + O(lambda^3),     all at z = z_0
    linear F_i: the product of (1 + lambda F_i), lambda^|S| for each subset S of the blocks

With lambda = 1 the sum grows like 2^n, or 2^(n/2) for independent branches, which norms must hide; with 1/n it stays
below e; with 1/sqrt(n) and independent branches the size grows by sqrt(e) over the whole depth. Default 1/sqrt(n) for
branches drawn independently; 1/n for tied or slowly varying ones, or where a small Lipschitz constant is wanted.

The theorem's text could not be read: the expansion is derived from what the abstract and the public reviews say of it,
and checked term by term. It describes pre-activation blocks, smooth or away from the kinks of ReLU. At 1/sqrt(n) the
terms of order 3 and more are not small: `expansion` measures the parts, it does not approximate a trained network.
The best learning rate depends on lambda: tune it anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import PlanError
from ..registry import register
from .norm_free import ScaledOutput, read_graph, remove_norms, replace

Scale = Literal["inv_sqrt", "inv"] | float


def residual_scale(blocks: int, scale: Scale = "inv_sqrt") -> float:
    """lambda for that many residual sums: 1/sqrt(n), 1/n, or the number itself. Raises `PlanError` on other values."""
    if blocks < 1:
        raise PlanError(f"residual scaling counts {blocks} residual sums; there must be at least one")
    if isinstance(scale, str):
        if scale not in ("inv_sqrt", "inv"):
            raise PlanError(f"residual scaling: scale is {scale!r}; choose 'inv_sqrt', 'inv' or a number")
        return 1 / math.sqrt(blocks) if scale == "inv_sqrt" else 1 / blocks
    if not math.isfinite(scale):
        raise PlanError(f"residual scaling: scale is {scale}; it must be finite")
    return float(scale)


class ScaledResidual(nn.Module):
    """skip(x) + scale * branch(x). `fold` puts the scale into the branch's last layer, if it ends in one."""

    def __init__(self, branch: nn.Module, scale: float, learn: bool = False, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = ScaledOutput(branch, scale, learn)
        self.skip = nn.Identity() if skip is None else skip

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


@register(
    "residual-scaling",
    acts_on="layers",
    paper="2510.03470",
    description="scales every residual branch by 1/sqrt(n) or 1/n and takes the norms out",
)
def scale_residuals(
    model: nn.Module,
    scale: Scale | Sequence[float] = "inv_sqrt",
    *,
    learn: bool = False,
    norms: Literal["remove", "keep"] = "remove",
    initialise: bool = True,
) -> nn.Module:
    """Scale every residual branch of a model, in place, and return it.

    scale: see `residual_scale`, n being the residual sums of the whole model; or a number for each in the order they
    are computed. learn: train each, from there (0: SkipInit). norms: "remove" puts identities in their place, gives the
    layers before them biases and, if `initialise`, draws layers of the branches anew (He), which keeps sizes. Blocks
    removed later leave the scales as they are. Raises `PlanError` if the model cannot be traced or has no residual sum.
    """
    if norms not in ("remove", "keep"):
        raise PlanError(f"residual scaling: norms is {norms!r}; choose 'remove' or 'keep'")
    graph = read_graph(model)
    if not graph.sums:
        raise PlanError(f"this {type(model).__name__} adds no branch to a shortcut; there is nothing to scale")
    n = len(graph.sums)
    if isinstance(scale, str | int | float):
        scales = [residual_scale(n, scale)] * n
    else:
        scales = [residual_scale(n, each) for each in scale]
    if len(scales) != n:
        raise PlanError(f"residual scaling: {len(scales)} scales for {n} residual sums; give one for each")
    if norms == "remove":
        remove_norms(model, graph)
        names = dict.fromkeys(name for found in graph.sums for name in found.weighted)  # in order: same seed, same draw
        for name in names if initialise else ():
            _initialise(model.get_submodule(name))
    for found, each in zip(graph.sums, scales):
        name = found.branch if norms == "remove" else found.end  # a norm behind the scale would undo it
        replace(model, name, ScaledOutput(model.get_submodule(name), each, learn))
    return model


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear | _ConvNd):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def expansion(
    z: Tensor, branches: Sequence[Callable[[Tensor], Tensor]], scale: float, head: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Orders 0, 1 and 2 in lambda of head(z_n), each with its power of `scale`; shapes of the head's output.

    z: z_0, [samples, ...]. branches: F_1 to F_n, unscaled, that keep the shape. head: linear (a bias is part of order
    0). n evaluations and n forward-mode products.
    """
    before, second = torch.zeros_like(z), torch.zeros_like(z)
    for branch in branches:
        value, change = torch.func.jvp(branch, (z,), (before,))[:2]
        before, second = before + value, second + change
    base, first = torch.func.jvp(head, (z,), (before,))[:2]
    _, second = torch.func.jvp(head, (z,), (second,))[:2]
    return [base, scale * first, scale**2 * second]
